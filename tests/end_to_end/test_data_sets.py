"""From text to a trained model through shards, and a bad image that gives way: real runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import descent

ROOT = Path(descent.__file__).resolve().parents[2]


def descent(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from descent.cli.main import main; main()", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250,
    )


def metrics(folder: Path) -> list[dict[str, float]]:
    (file,) = folder.glob(".descent/runs/*/metrics.jsonl")
    return [json.loads(line)[2] for line in file.read_text().splitlines()]


def test_text_becomes_shards_and_trains_with_the_wait_for_data_told(tmp_path):
    made = descent(
        tmp_path, "data", "tokenize", str(ROOT / "service"), "toks", "--pattern", "**/*.py", "--shard-tokens", "50000"
    )
    assert made.returncode == 0, made.stderr
    assert "descent train data=tokens data.path=toks" in made.stdout
    done = descent(
        tmp_path,
        "train",
        "data=tokens",
        "data.path=toks",
        "data.window=2000",
        "data.block=32",
        "model=gpt_tiny",
        "model.width=16",
        "model.layers=1",
        "epochs=null",
        "steps=20",
        "batch.size=16",
        "workers=2",
        "resources.cpus=0.5",
        "diagnostics.every=5",
        "--json",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    waits = [row["perf/data_wait"] for row in metrics(tmp_path) if "perf/data_wait" in row]
    assert waits and all(0.0 <= wait <= 1.0 for wait in waits)


def test_a_truncated_image_ends_a_run_by_name_or_is_replaced_and_counted(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    for i, (image, label) in enumerate(zip(pixels[:200], labels[:200], strict=True)):
        place = tmp_path / "images" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8)).save(place / f"{i:03d}.png")
    bad = sorted((tmp_path / "images").rglob("*.png"))[100]
    bad.write_bytes(bad.read_bytes()[:50])
    options = [
        "train",
        "data=images",
        "data.path=images",
        "data.channels=1",
        "data.processes=1",
        "data.holdout=0",
        "epochs=3",
        "batch.size=50",
        "workers=2",
        "resources.cpus=0.5",
        "--json",
    ]
    failed = descent(tmp_path, *options)
    assert failed.returncode != 0
    assert f"{bad.name} (sample 100): " in failed.stderr and "data.on_error=skip" in failed.stderr
    for folder in (tmp_path / ".descent" / "runs").iterdir():
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    done = descent(tmp_path, *options, "data.on_error=skip")
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(row.get("data/replaced", 0.0) for row in metrics(tmp_path)) >= 2
