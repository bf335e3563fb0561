"""The real controller as a function of its memory: put into any state, given one event, asked what it did.

Its memory (the attributes of `RunState`, what the group double knows of each worker, what is logged and what
is committed) is frozen into one value, so that a world can hold it and the exploration can come back to it.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from descent.cluster.control import control_file, policy
from descent.cluster.control.checkpoints import CheckpointCommitter, CheckpointResult
from descent.cluster.control.controller import Controller
from descent.cluster.control.policy import Decision, View
from descent.cluster.control.run_state import ControllerState, RunState
from descent.cluster.record.run_log import RunLog
from descent.cluster.workers.group import WorkerInfo
from descent.config import RunConfig, compose
from descent.messages import Incident, ShareWritten, StepRecord, TrainingRecord, WorkerStatus
from descent.training.collectives import Store
from descent.training.plan import Plan
from tests.unit.membership.double import ManualClock, ScriptedGroup
from tests.unit.membership.world import Rules, S, Scenario, Status, Violation

LONG_S = 1e9
ABORT_S = 11.0
"""A little longer than the controller waits for a member to leave its generation."""


class Silent:
    """A listener that shows nothing."""

    def record(self, record: TrainingRecord, world_size: int) -> None: ...

    def incident(self, incident: Incident) -> None: ...

    def world(self, generation: int, world_size: int, step: int) -> None: ...

    def note(self, line: str) -> None: ...

    def line(self, line: str) -> None: ...

    def tick(self) -> None: ...


class NoFiles(RunLog):
    """A run log that remembers which records are logged, and writes nothing."""

    def append(self, record: TrainingRecord) -> None:
        self._note(record)

    def flush(self) -> None: ...

    def incident(self, incident: Incident) -> None:
        self.incidents.append(incident)

    def amend(self, index: int, incident: Incident) -> None:
        self.incidents[index] = incident


class NoStorage(CheckpointCommitter):
    """A committer whose storage takes everything at once."""

    def _commit(self, shares: list[ShareWritten]) -> Path:
        return Path(f"step-{shares[0].step}")

    def add_share(self, share: ShareWritten) -> None:
        shares = self._shares.setdefault((share.generation, share.step), {})
        shares[share.rank] = share

    def take_results(self) -> list[CheckpointResult]:
        results = []
        for (_, step), shares in list(self._shares.items()):
            if len(shares) == next(iter(shares.values())).world_size:
                self.step, self.newest = step, Path(f"step-{step}")
                results.append(CheckpointResult(step))
                self._shares.pop((next(iter(shares.values())).generation, step))
        return results

    def return_to_newest(self) -> list[str]:
        return []


@functools.cache
def config_of(*overrides: str) -> RunConfig:
    return compose(["checkpoint.every=2", "tracking.system_metrics=false", *overrides]).config


def plan_of(low: int, high: int, steps: int) -> Plan:
    return Plan(
        total_steps=steps,
        batch_size=16,
        num_samples=160,
        num_evaluation=0,
        steps_per_epoch=10,
        slots=max(high, 4),
        min_workers=low,
        max_workers=high,
        micro_size=8,
        nominal=16.0,
        threads=1,
        device="cpu",
        gpus=0.0,
        num_parameters=100,
    )


Event = tuple[Any, ...]
"""("receive", worker, status, records, shares) | ("lost", worker, how) | ("still", workers) | ("wait", seconds) |
("stop",) | ("start",)"""
Action = tuple[str, Any]
"""("decision", Decision) or (command, (worker, argument))."""


class Memory(NamedTuple):
    """The controller's memory, frozen."""

    state: tuple[Any, ...]
    known: tuple[tuple[Status | None, bool, bool, bool, bool], ...] = ()
    """Per worker: (last status, stalled, dead, excused, whether the unanswered poll asks for records)."""
    logged: int = 0
    saved: int = -1
    shares: frozenset[tuple[int, int, int, int]] = frozenset()


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the exploration and its properties need of a memory, ready to be read."""

    state: ControllerState
    members: tuple[int, ...]
    generation: int
    statuses: tuple[Status | None, ...]
    stalled: frozenset[int]
    dead: frozenset[int]
    asked: frozenset[int]
    logged: int
    saved: int
    stopping: bool
    awaited: tuple[tuple[int, int], ...]


class Machine:
    """One real controller that is put into one memory after the other."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self._scenario, self._clock = scenario, ManualClock()
        self._store = Store("127.0.0.1")
        config = config_of()
        self._group = ScriptedGroup(self._clock, scenario.room + scenario.high)
        self._log = NoFiles(folder)
        self._committer = NoStorage(folder, "r", "0" * 64, config.checkpoint, None, clock=self._clock)
        plan = plan_of(scenario.low, scenario.high, scenario.steps)
        self.controller = Controller(
            config, plan, self._group, self._store, self._log, self._committer, Silent(), clock=self._clock
        )
        self._state: RunState = self.controller._state
        self._decisions: list[Decision] = []
        self._numbers: dict[Memory, int] = {}
        self._memories: list[Memory] = []
        self._seen: list[Seen] = []
        self._turns: dict[tuple[int, int, Event], tuple[int, int, tuple[Action, ...], policy.End | None]] = {}
        self._fresh = dict(vars(self._state))
        self.first = self._number(self._freeze())

    @contextlib.contextmanager
    def under(self, rules: Rules) -> Iterator[None]:
        """While the rules hold, broken ones included."""

        def decide(view: View) -> Decision:
            decision = rules.decide(view)
            if not isinstance(decision, policy.Wait):
                self._decisions.append(decision)
            return decision

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(policy, "decide", decide)
            patch.setattr(control_file, "_write", lambda *_: None)
            for owner, name, replacement in rules.mutate:
                patch.setattr(owner, name, replacement)
            yield

    def seen(self, number: int) -> Seen:
        return self._seen[number]

    def react(self, number: int, room: int, event: Event) -> tuple[int, int, tuple[Action, ...], policy.End | None]:
        """From this memory, with room for so many workers: (memory, room, actions, the end) after the event."""
        key = (number, room, event)
        found = self._turns.get(key)
        if found is None:
            found = self._turns[key] = self._react(number, room, event)
        return found

    def _react(self, number: int, room: int, event: Event) -> tuple[int, int, tuple[Action, ...], policy.End | None]:
        self._thaw(self._memories[number])
        self._group.free = room
        self._apply(event)
        actions: list[Action] = []
        before = None
        # Until there is nothing more to do before something else happens.
        while (now := self._freeze()) != before or event[0] == "start":
            before, event = now, ("",)
            self.controller._scaling._looked_at = -LONG_S
            self._decisions.clear()
            at = self._clock.now
            try:
                end = self.controller.turn()
            except AssertionError as error:
                raise Violation(f"no such step of the controller: {error}") from error
            self._clock.now = at
            actions += [("decision", d) for d in self._decisions]
            actions += [(command, (index(w), argument)) for command, w, argument in self._group.sent]
            self._group.sent.clear()
            if end is not None:
                return self._number(self._freeze()), self._group.free, tuple(actions), end
        return self._number(now), self._group.free, tuple(actions), None

    def _apply(self, event: Event) -> None:
        group = self._group
        if event[0] == "start":
            self.controller.start()
        elif event[0] == "receive":
            _, worker, status, records, shares = event
            group.answers.append(self._answer(worker, status, records, shares))
        elif event[0] == "lost":
            name = f"w{event[1]}"
            if event[2] == "gone":
                group.die(name)
            else:  # no answer: the controller itself must find out
                group.silent.add(name)
                group.answered_at[name] = self._clock.now - LONG_S
        elif event[0] == "still":
            for worker in event[1]:
                known = group.known[f"w{worker}"]
                assert known.status is not None
                known.status = dataclasses.replace(known.status, phase_age_s=LONG_S)
        elif event[0] == "wait":
            self._state.entered_at = self._clock.now - event[1]
        elif event[0] == "stop":
            self.controller.stop()

    def _answer(self, worker: int, status: Status, records: Any = (), shares: Any = ()) -> WorkerStatus:
        return WorkerStatus(
            f"w{worker}",
            S(status.state),
            status.generation,
            status.step,
            status.step,
            "step",
            0.0,
            records=tuple(StepRecord(step, {}, 0) for step in records),
            shares=tuple(ShareWritten(step, rank, size, number) for number, step, rank, size in shares),
            leaving=status.leaving,
        )

    # -- freezing and thawing ---------------------------------------------------------------

    def _freeze(self) -> Memory:
        group, names = self._group, self._fresh
        known = []
        for worker_id, worker in group.known.items():
            status, stalled = None, False
            if (s := worker.status) is not None:
                status, stalled = Status(s.state.value, s.generation, s.step, s.leaving), s.phase_age_s > 0.0
            known.append((status, stalled, worker.dead, worker.excused, group.polled.get(worker_id, False)))
        values = vars(self._state)
        state = tuple(_frozen(values[name]) for name in names if name not in ("entered_at", "breakage"))
        shares = frozenset(
            (number, step, rank, share.world_size)
            for (number, step), by_rank in self._committer._shares.items()
            for rank, share in by_rank.items()
        )
        return Memory(state, tuple(known), self._log.last_step, self._committer.step, shares)

    def _thaw(self, memory: Memory) -> None:
        clock, group, state = self._clock, self._group, self._state
        names = [name for name in self._fresh if name not in ("entered_at", "breakage")]
        for name, value in zip(names, memory.state, strict=True):
            setattr(state, name, dict(value) if name == "_awaited" else value)
        state.entered_at, state.breakage = clock.now, None
        group.known.clear()
        group.polled.clear()
        group.silent.clear()
        group.sent.clear()
        for number, (status, stalled, dead, excused, asked) in enumerate(memory.known):
            name = f"w{number}"
            answer = None
            if status is not None:
                answer = self._answer(number, status)
                if stalled:
                    answer = dataclasses.replace(answer, phase_age_s=LONG_S)
            group.known[name] = WorkerInfo(name, answer, dead, "", excused)
            group.answered_at[name] = clock.now
            if not dead:
                group.polled[name] = asked
        self._log.last_step = memory.logged
        self._committer.step = memory.saved
        self._committer.newest = Path(f"step-{memory.saved}") if memory.saved >= 0 else None
        self._committer._shares.clear()
        for generation, step, rank, size in memory.shares:
            share = ShareWritten(step, rank, size, generation)
            self._committer._shares.setdefault((generation, step), {})[rank] = share
        self.controller._journal.incidents._open.clear()
        self._log.incidents.clear()

    def _number(self, memory: Memory) -> int:
        number = self._numbers.get(memory)
        if number is None:
            number = self._numbers[memory] = len(self._memories)
            self._memories.append(memory)
            self._seen.append(self._read(memory))
        return number

    def _read(self, memory: Memory) -> Seen:
        state, known = self._state, enumerate(memory.known)
        entries = list(known)
        return Seen(
            state.state,
            tuple(map(index, state.generation.members)),
            state.generation.number,
            tuple(entry[0] for entry in memory.known),
            frozenset(i for i, entry in entries if entry[1]),
            frozenset(i for i, entry in entries if entry[2]),
            frozenset(i for i, entry in entries if entry[4]),
            memory.logged,
            memory.saved,
            state.stop_requested,
            tuple((index(w), step) for w, step in state._awaited.items()),
        )


def _frozen(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


def index(name: str) -> int:
    """w3 -> 3."""
    return int(name[1:])
