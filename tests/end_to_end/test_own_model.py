"""The README's own-model example, taken from the README as it stands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
DESCENT = str(Path(sys.executable).with_name("descent"))


FORMS = re.findall(
    r"`(my_\w+)\.py`:\n\n```python\n(.*?)```\n\n```\n(.*?)```",
    README.read_text().split("\n## Your own model\n")[1].split("\n## ")[0],
    re.S,
)
REACHES = {
    "my_model": {"eval/accuracy": 0.9},
    "my_gpt": {"eval/perplexity": -4.0},
    "my_task": {"eval/worst_recall": 0.8, "eval/f1": 0.9},
}
"""Figure -> what it is at least; negative: what it is at most."""


def test_the_readme_shows_three_forms() -> None:
    assert [name for name, _, _ in FORMS] == list(REACHES)


@pytest.mark.parametrize(("name", "module", "command"), FORMS, ids=[name for name, _, _ in FORMS])
def test_a_form_of_the_readme_trains_and_its_model_predicts(
    tmp_path: Path, name: str, module: str, command: str
) -> None:
    (tmp_path / f"{name}.py").write_text(module)
    words = shlex.split(command)
    assert words[:2] == ["descent", "train"]
    done = subprocess.run(
        [DESCENT, "train", "--json", *words[2:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.strip().splitlines()[-1])
    assert summary["state"] == "FINISHED"
    for figure, bound in REACHES[name].items():
        assert summary[figure] > bound if bound > 0 else summary[figure] < -bound
    inputs = {
        "my_model": "np.zeros((2, 13), np.float32)",
        "my_gpt": "{'input_ids': np.zeros((2, 8), np.int64)}",
        "my_task": "{'acid': np.zeros((2, 5), np.float32), 'rest': np.zeros((2, 8), np.float32)}",
    }[name]
    predicted = subprocess.run(
        [sys.executable, "-c", _PREDICT, summary["tracking_uri"], summary["model_uri"], inputs, name],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert predicted.returncode == 0, predicted.stderr
    assert json.loads(predicted.stdout.splitlines()[-1])[:1] == [2]


_PREDICT = """
import sys, mlflow, numpy as np, json
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
assert sys.argv[4] not in sys.modules and "descent" not in sys.modules
found = model.predict(eval(sys.argv[3]))
first = next(iter(found.values())) if isinstance(found, dict) else found
print(json.dumps(list(np.asarray(first).shape)))
"""
