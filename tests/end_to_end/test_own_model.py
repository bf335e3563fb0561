"""The README's own-model example, taken from the README as it stands."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
DESCENT = str(Path(sys.executable).with_name("descent"))


def test_the_example_of_the_readme_trains_and_its_model_predicts(tmp_path: Path) -> None:
    section = README.read_text().split("## Your own model in ten lines")[1].split("\n## ")[0]
    module, command = re.findall(r"```(?:python)?\n(.*?)```", section, re.S)
    (tmp_path / "my_model.py").write_text(module)
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
    assert summary["eval/accuracy"] > 0.9
    predicted = subprocess.run(
        [sys.executable, "-c", _PREDICT, summary["tracking_uri"], summary["model_uri"]],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert predicted.returncode == 0, predicted.stderr
    assert json.loads(predicted.stdout.splitlines()[-1]) == [2, 3]


_PREDICT = """
import sys, mlflow, numpy as np, json
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
assert "my_model" not in sys.modules and "descent" not in sys.modules
print(json.dumps(list(np.asarray(model.predict(np.zeros((2, 13), np.float32))).shape)))
"""
