"""The folder of a run made when the package was called `service` goes on, to the bits of a run without a break."""

import json
import subprocess
import sys
from pathlib import Path

from descent.checkpoint.manifest import MANIFEST, _seal, read_manifest

DESCENT = str(Path(sys.executable).with_name("descent"))
RUN = ["schedule=constant", "optimizer=muon", "epochs=null", "workers=1", "slots=2", "tracking.system_metrics=false"]
MOVED = {
    "descent.optim.schedules": "service.training.schedules",
    "descent.optim.optimizers": "service.training.optimizers",
    "descent.models": "service.models",
    "descent.data": "service.data",
}


def train(folder: Path, *overrides: str) -> dict[str, object]:
    command = [DESCENT, "train", "--json", *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def make_former(run_dir: Path) -> None:
    """Rewrite the folder as the former version left it: its targets, and with them another hash of the config."""
    file = run_dir / "run.json"
    text = file.read_text()
    for current, former in MOVED.items():
        text = text.replace(current, former)
    assert "descent." not in json.dumps(json.loads(text)["config"]["model"])
    former_sha256 = "f" * 64
    file.write_text(json.dumps({**json.loads(text), "config_sha256": former_sha256}))
    for manifest in run_dir.glob(f"checkpoints/*/{MANIFEST}"):
        content = {**json.loads(manifest.read_text()), "config_sha256": former_sha256}
        content.pop("sha256")
        manifest.write_text(json.dumps({**content, "sha256": _seal(content)}))
        assert read_manifest(manifest.parent).config_sha256 == former_sha256


def test_a_former_run_goes_on_to_the_bits_of_an_unbroken_one(tmp_path: Path) -> None:
    whole = train(tmp_path, *RUN, "name=whole", "steps=8")
    train(tmp_path, *RUN, "name=old", "steps=4")
    make_former(tmp_path / ".descent" / "runs" / "old")
    again = train(tmp_path, "resume=old", "steps=8")
    assert (again["state"], again["step"]) == ("FINISHED", 8)
    assert again["state_sha256"] == whole["state_sha256"]
