"""The user's observers: what they see, what reaches tracking, and that nothing of theirs reaches the training."""

import csv
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from descent.cluster.run import observers as observers_module
from descent.cluster.run.observers import Observers, build_observers
from descent.config import compose
from descent.errors import ConfigError
from descent.messages import EvaluationRecord, StepRecord
from descent.tracking import Tracker
from tests import own_observers


class Watched:
    """A run's observers with a real tracker, whose spool keeps what they said."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.notes, self.stops = folder, list[str](), list[str]()
        given = [f"+observers.{o}" for o in overrides]
        self.composed = compose([*given, "trusted_modules=[tests.own_observers]", "seed=7"])
        self.tracker = Tracker.open(uri="http://127.0.0.1:9", experiment="e", run_name="r", spool_dir=folder / "spool")
        self.observers = Observers(
            build_observers(self.composed.config),
            self.composed.without_secrets(),
            folder,
            self.tracker,
            self.notes.append,
        )
        self.observers.finish_early = self.stops.append

    def train(self, steps: int = 3) -> "Watched":
        for step in range(1, steps + 1):
            self.observers.record(StepRecord(step, {"train/loss": 1.0 / step, "grad/norm": 1.0}, 1000 * step), 2)
            self.observers.record(EvaluationRecord(step, {"eval/loss": 2.0 / step}, 1000 * step), 2)
        return self

    def finish(self, patience_s: float = 60.0) -> list[dict[str, Any]]:
        """The records in the spool, once all has been said."""
        self.observers.finish("FINISHED", 3, patience_s)
        return [json.loads(line) for line in (self.folder / "spool" / "records.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    own_observers.calls.clear()
    own_observers.GATE.clear()
    yield
    own_observers.GATE.set()


def metrics_of(records: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    return {(r["step"], name): value for r in records for name, value in r.get("metrics", {}).items()}


def test_a_function_is_called_for_every_event_in_order(tmp_path: Path) -> None:
    records = Watched(tmp_path, "n={_target_: tests.own_observers.note, scale: 8}").train().finish()
    each = [(event, step) for step in (1, 2, 3) for event in ("on_step", "on_evaluate")]
    assert own_observers.calls == [*each, ("on_end", 3)]
    # At the end an observer sees the last value of each metric.
    assert metrics_of(records) == {(1, "n/loss"): 8.0, (2, "n/loss"): 4.0, (3, "n/loss"): 8 / 3}


def test_all_that_an_observer_says_reaches_tracking_below_its_own_name(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "all={_target_: tests.own_observers.Everything, stop_at: 2}").train()
    records = watched.finish()
    found = metrics_of(records)
    assert found == {(s, name): v for s in (1, 2, 3) for name, v in (("all/a", float(s)), ("all/group/b", 2.0))}
    texts = {r["path"]: r["text"] for r in records if r["op"] == "text"}
    rows = list(csv.DictReader(io.StringIO(texts["all/seen/step-000002.csv"])))
    assert rows == [{"name": "eval/loss", "value": "1.0"}]
    assert texts["all/how/step-000003.txt"] == f"FINISHED 7 {1 / 3}"
    files = {(r["path"], Path(r["file"]).name): r["file"] for r in records if r["op"] == "file"}
    assert set(files) == {("all/plot", "step-000003.png"), ("all/pixels", "step-000003.png"), ("all", "mine.bin")}
    kept = tmp_path / "spool" / "files"
    assert (kept / files["all", "mine.bin"]).read_bytes() == b"123"
    assert (kept / files["all/plot", "step-000003.png"]).read_bytes().startswith(b"\x89PNG")
    assert watched.stops == ["observers.all: good enough"]


@pytest.mark.parametrize(
    ("observer", "said"),
    [
        ("Failing", "its on_step failed at step 2: KeyError: 'a slip' (own_observers.py"),
        ("Changing", "its on_step failed at step 1: TypeError"),
        ("Secretive", "its on_step failed at step 1: ValueError: '../train/loss' can't be a name"),
    ],
)
def test_one_that_raises_is_named_once_and_called_no_more(tmp_path: Path, observer: str, said: str) -> None:
    watched = Watched(tmp_path, f"bad=tests.own_observers.{observer}", "n=tests.own_observers.note").train()
    records = watched.finish()
    [note] = watched.notes
    assert said in note and note.startswith("observers.bad._target_=tests.own_observers.")
    tags = [tag for r in records for tag in r.get("tags", {})]
    assert tags == ["descent.observer_error.bad"]
    alive = [step for step, name in metrics_of(records) if name == "bad/alive"]
    assert alive == ([1, 2] if observer == "Failing" else [])
    assert len(own_observers.calls) == 7  # the other one goes on


def test_no_step_waits_for_a_slow_one_and_what_waits_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observers_module, "_WAITING", 10)
    watched = Watched(tmp_path, "slow=tests.own_observers.Slow", "n=tests.own_observers.note")
    watched.observers.record(StepRecord(1, {}, 0), 1)
    while not watched.observers._busy_with:
        time.sleep(0.001)
    for step in range(2, 52):  # returns, though the observer waits
        watched.observers.record(StepRecord(step, {}, 0), 1)
    watched.observers.record(EvaluationRecord(51, {}, 0), 1)
    own_observers.GATE.set()
    watched.finish()
    steps = [step for event, step in own_observers.calls if event == "on_step"]
    assert steps == list(range(1, 12))
    assert ("on_evaluate", 51) in own_observers.calls and ("on_end", 3) in own_observers.calls
    assert watched.notes == ["observers: slower than the training, so 40 steps were not shown to them"]


def test_the_end_of_a_run_does_not_wait_for_ever(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "slow=tests.own_observers.Slow").train()
    watched.finish(patience_s=0.05)
    assert "is still busy" in watched.notes[-1] and "observers.slow._target_" in watched.notes[-1]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("tests.own_observers.Nothing", "gives a Nothing with none of the methods on_step, on_evaluate, on_end"),
        ("tests.own_observers.Misspelt", "nothing calls its on_evaluation; did you mean on_evaluate?"),
        ("tests.own_observers.Narrow", "on_step must take two arguments, (run, log)"),
        ("tests.own_observers.Absent", "has no 'Absent'"),
        ("torch.optim.SGD", "is a class of kind 'optimizer'"),
        ("os.system", "not under the trusted modules"),
    ],
)
def test_what_is_no_observer_is_refused(target: str, said: str) -> None:
    composed = compose([f"+observers.x={target}", "trusted_modules=[tests.own_observers]"])
    with pytest.raises(ConfigError) as refused:
        build_observers(composed.config)
    assert str(refused.value).startswith(f"observers.x._target_={target}: ") and said in str(refused.value)


@pytest.mark.parametrize("name", ["train", "eval", "_x"])
def test_a_name_that_is_the_runs_own_or_odd_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="can't be an observer's name"):
        compose([f"+observers.{name}=my.fn"])
