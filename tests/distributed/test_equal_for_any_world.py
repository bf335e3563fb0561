"""The result doesn't depend on who computed it: one replica against two, three and four."""

import math
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from descent.config import compose, groups
from tests import hard_to_repeat as hard
from tests.distributed.replicas import Case, Crew
from tests.hard_to_repeat import overrides

STEPS = 6
MODELS = {
    "mlp": ["model=mlp"],
    "mlp_batch_norm_dropout_residual": [
        "model=mlp",
        "model.depth=3",
        "model.norm=batch",
        "model.dropout=0.2",
        "model.residual=true",
    ],
    "resnet": ["model=resnet", "model.widths=[4,8]", "model.blocks=1"],
    "gpt": [
        "model=gpt_tiny",
        "data=stdlib",
        "data.block=12",
        "data.max_bytes=9000",
        "model.layers=1",
        "model.heads=2",
        "model.width=16",
        "model.dropout=0.1",
        "model.tied=true",
    ],
}
OPTIMIZERS = ["sgd", "momentum", "adamw", "rmsprop", "adagrad", "muon"]
FIRST_FAST = 100
EXTRAS = [
    ["clip.norm=0.5"],
    ["clip.value=0.01"],
    ["ema.decay=0.9"],
    ["schedule=one_cycle"],
    ["schedule=plateau", "evaluate.every=2"],
    ["evaluate.every=3"],
    ["seed=7"],
]


def drawn(number: int) -> tuple[str, list[str], int, int]:
    """(what it is, overrides, slots, world size) of one case; the same for the same number."""
    rng = random.Random(number)
    name = list(MODELS)[number % len(MODELS)]
    world = 2 + number // len(MODELS) % 3
    slots = rng.choice([s for s in (2, 3, 4, 5, 7) if s >= world])
    batch = rng.randrange(2 * slots, 41)
    # Batch norm can't train on a micro-batch of one sample: there a slot is computed whole.
    whole = "batch_norm" in name or name == "resnet"
    micro = "auto" if whole else rng.choice(["auto", 1, 2, 3])
    # Muon needs hidden matrices, and turns a rounding of a gradient's small singular values
    # into a difference of order one: only equal bits survive that.
    muon = number < FIRST_FAST and name != "resnet"
    optimizer, extra = rng.choice(OPTIMIZERS if muon else OPTIMIZERS[:-1]), rng.choice(EXTRAS)
    overrides = [
        *MODELS[name],
        f"optimizer={optimizer}",
        f"batch.size={batch}",
        f"batch.micro_size={micro}",
        f"steps={STEPS}",
        "epochs=null",
        *extra,
    ]
    reports = f"{name}-batch{batch}-slots{slots}-world{world}-micro{micro}-{optimizer}-{extra[0]}"
    return reports, overrides, slots, world


EXACT = [drawn(n) for n in range(24)]
FAST = [drawn(n) for n in range(FIRST_FAST, FIRST_FAST + 12)]


@pytest.mark.parametrize(("overrides", "slots", "world"), [c[1:] for c in EXACT], ids=[c[0] for c in EXACT])
def test_exact_reduction_gives_the_same_bits(
    pool: Crew, tmp_path: Path, overrides: list[str], slots: int, world: int
) -> None:
    case = Case.of([*overrides, "reduction=exact"], tmp_path, slots)
    alone, *others = [*pool.train(case, 1), *pool.train(case, world)]
    assert len(alone.losses) == alone.step == STEPS and all(map(math.isfinite, alone.losses))
    for other in others:
        assert other.metrics == alone.metrics  # losses, norms, evaluations: to the last bit
        assert other.sha256 == alone.sha256


@pytest.mark.parametrize(("overrides", "slots", "world"), [c[1:] for c in FAST], ids=[c[0] for c in FAST])
def test_fast_reduction_gives_the_same_losses_within_rounding(
    pool: Crew, tmp_path: Path, overrides: list[str], slots: int, world: int
) -> None:
    # Small steps, so that rounding isn't amplified by the training itself.
    overrides = [*overrides, "optimizer.lr=1e-3"]
    fast = Case.of([*overrides, "reduction=fast"], tmp_path, slots)
    alone, first, *rest = [*pool.train(fast, 1), *pool.train(fast, world)]
    exact = pool.train(Case.of([*overrides, "reduction=exact"], tmp_path, slots), world)[0]
    assert len(alone.losses) == STEPS
    assert first.losses == pytest.approx(alone.losses, rel=1e-4)
    assert exact.losses == pytest.approx(alone.losses, rel=1e-4)
    for other in rest:  # replicas of one generation never differ by a bit
        assert (other.metrics, other.sha256) == (first.metrics, first.sha256)


PLATEAU = ["evaluate.every=1", "evaluate.batch_size=20", "schedule=plateau", "schedule.patience=0"]
HARD_TO_REPEAT = {
    "several_buckets": ["model.depth=3", "model.width=1501", "batch.size=30", "clip.norm=0.5"],
    "two_threads": [*overrides(hard.LookedUp), "batch.size=160", "resources.cpus=2"],
    "draws_in_evaluation": [*overrides(hard.AlwaysDrawing), *PLATEAU],
    "uses_non_torch_rng": [*overrides(hard.DrawingElsewhere), *PLATEAU],
    "draws_late": overrides(hard.DrawingLate),
    "replaces_a_buffer": [*overrides(hard.Centred), "evaluate.every=1"],
    "lazy": overrides(hard.Lazy),
}


@pytest.mark.parametrize("run", HARD_TO_REPEAT.values(), ids=HARD_TO_REPEAT.keys())
def test_nothing_else_tells_either(pool: Crew, tmp_path: Path, run: list[str]) -> None:
    case = Case.of([*run, "steps=5", "epochs=null", "reduction=exact"], tmp_path)
    alone, *others = [reports for world in (1, 2, 3, 4) for reports in pool.train(case, world)]
    for other in others:
        assert (other.metrics, other.sha256) == (alone.metrics, alone.sha256)


def test_a_compiled_model_has_the_same_bits_whichever_size_of_slot_comes_first(pool: Crew, tmp_path: Path) -> None:
    run = ["compile=true", "model.norm=batch", "model.dropout=0.2", "batch.size=1400"]
    case = Case.of([*run, "steps=3", "epochs=null", "reduction=exact"], tmp_path, 3)
    assert len({reports.sha256 for w in (1, 3) for reports in pool.train(case, w)}) == 1


def test_more_slots_than_samples_in_a_micro_batch_and_one_sample_a_slot(pool: Crew, tmp_path: Path) -> None:
    case = Case.of(["batch.size=7", "steps=4", "epochs=null", "reduction=exact", "model.dropout=0.5"], tmp_path, 7)
    assert len({reports.sha256 for w in (1, 2, 3, 4) for reports in pool.train(case, w)}) == 1


def test_the_micro_size_changes_rounding_only(pool: Crew, tmp_path: Path) -> None:
    case = Case.of(["batch.size=64", "steps=5", "epochs=null", "reduction=exact"], tmp_path)
    whole, halved = (pool.train(case, 2, micro_size=m)[0] for m in (16, 8))
    assert halved.losses == pytest.approx(whole.losses, rel=1e-5)


def _images(folder: Path) -> Path:
    """A folder in the format of Fashion-MNIST: [n, 28, 28] pixels and n labels, training and test."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 600), ("t10k", 100)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        head = struct.pack(">IIII", 0x803, count, 28, 28), struct.pack(">II", 0x801, count)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(head[0] + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(head[1] + labels.tobytes())
    return folder


EXPERIMENTS = {
    "digits": [],
    "digits_resnet": [],
    "breast_cancer": [],
    "mnist5k": [],
    "vanishing": [],
    "fashion_mnist": ["data.path=IMAGES"],
    "stdlib_gpt": ["data.max_bytes=20000", "data.block=24", "schedule.warmup_steps=1"],
}
"""Experiment -> what makes a few of its steps short."""


def test_every_experiment_is_looked_at() -> None:
    fast = {"gpt_124m"}  # reduction=fast: follows the number of workers, and says so
    assert set(EXPERIMENTS) | fast == set(groups()["experiment"])
    assert all(compose([f"experiment={name}"]).config.slots == "workers" for name in fast)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_number_of_workers_alone_changes_no_bit_of_an_experiment(
    pool: Crew, tmp_path: Path, experiment: str
) -> None:
    shorter = [text.replace("IMAGES", str(_images(tmp_path))) for text in EXPERIMENTS[experiment]]
    typed = [f"experiment={experiment}", *shorter, "epochs=null", "steps=3", "evaluate.every=end"]
    hashes = {
        reports.sha256
        for world in (1, 2, 4)
        for reports in pool.train(Case.as_typed([*typed, f"workers={world}"], tmp_path), world)
    }
    assert len(hashes) == 1
