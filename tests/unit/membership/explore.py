"""Every world that can be reached, breadth first; the shortest way to whatever is wrong."""

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from descent.cluster.control import policy
from descent.cluster.control.run_state import ControllerState
from descent.messages import TerminalState
from tests.unit.membership.machine import ABORT_S, LONG_S, Action, Event, Machine, Seen
from tests.unit.membership.workers import deliver, delivered, meetings, moves, put, take
from tests.unit.membership.world import GONE, Join, Rules, S, Scenario, Violation, Worker, World

Following = tuple[str, World, bool]
"""(what happens, the world afterwards, whether it is a fault and so need not happen)."""
_MAX_GENERATIONS = 9
"""More than bounded faults can need: beyond it regroups follow each other without end."""


class Explorer:
    """The worlds of one scenario under one set of rules."""

    def __init__(self, scenario: Scenario, rules: Rules, machine: Machine) -> None:
        self.scenario, self.rules, self.machine = scenario, rules, machine
        self.ended: dict[int, str] = {}
        """Memory -> how the run ended with it."""

    def start(self) -> World:
        """All workers of the first generation are being started, or are ready."""
        world = self.react(World((), self.machine.first, self.scenario.room + self.scenario.high, 0), ("start",))
        if self.scenario.prompt:
            for index in range(self.scenario.high):
                world = world.with_worker(index, state=S.READY.value)
                world = self.receive(world, index)
        return world._replace(faults=self.scenario.faults)

    # -- the controller -----------------------------------------------------------------------

    def react(self, world: World, event: Event) -> World:
        """The controller takes in an event and does what follows from it."""
        number, room, actions, end = self.machine.react(world.controller, world.room, event)
        world = world._replace(controller=number, room=room)
        for action in actions:
            world = self._follow(world, action)
        if self.scenario.prompt:
            world = delivered(world, self.rules)
        if end is not None:
            self._check_end(world, end)
            self.ended[number] = str(end.state)
        return world

    def _follow(self, world: World, action: Action) -> World:
        kind, about = action
        if kind == "decision":
            self._check_decision(world, about)
            return world
        index, argument = about
        if kind == "start":
            assert index == len(world.workers)
            return world._replace(workers=(*world.workers, Worker()))
        if kind in ("kill", "release"):
            life = "cut" if world.workers[index].life == "cut" else "gone"
            return world if life == "cut" else world._replace(workers=put(world.workers, index, GONE))
        if kind == "checkpoint" or world.workers[index].life in ("gone", "cut"):
            return world
        message: tuple[Any, ...] = (kind, argument)
        if kind == "join":
            members = tuple(int(w[1:]) for w in self._formed.workers)
            restore = -1 if argument.restore_from is None else int(argument.restore_from.rpartition("-")[2])
            where = Join(argument.generation, argument.rank, members, argument.behind, restore, argument.save_only)
            message = ("join", where)
        worker = world.workers[index]
        return world.with_worker(index, inbox=(*worker.inbox, message))

    def _check_decision(self, world: World, decision: policy.Decision) -> None:
        seen = self.machine.seen(world.controller)
        living = [w.step for i, w in enumerate(world.workers) if w.alive and i not in self._dead(seen)]
        if isinstance(decision, policy.Restore) and max(living, default=0) > max(seen.saved, 0):
            raise Violation("a living worker holds more than the checkpoint that is restored")
        if isinstance(decision, policy.Form):
            self._formed = decision
            source = world.workers[int(decision.workers[0][1:])]
            step = max(source.step, seen.saved if decision.restore else -1)
            if source.alive and step < max([*living, seen.saved]):
                raise Violation(f"going on from step {step}, though step {max([*living, seen.saved])} is there")
            if seen.generation > _MAX_GENERATIONS:
                raise Violation("regroups without end")

    def _dead(self, seen: Seen) -> frozenset[int]:
        return seen.dead

    def _check_end(self, world: World, end: policy.End) -> None:
        seen = self.machine.seen(world.controller)
        living = [w for i, w in enumerate(world.workers) if w.life in ("up", "wedged") and i not in seen.dead]
        if end.state is TerminalState.FAILED and len(living) + world.room >= self.scenario.low:
            raise Violation(f"gave up ({end.reason}) though enough workers live or can be started")
        if end.state is TerminalState.FINISHED:
            members = [world.workers[m] for m in seen.members if world.workers[m].life == "up"]
            if any(m.step != self.scenario.steps for m in members):
                raise Violation("finished before the last step")
            # What is still missing of the records is fetched from the members that live.
            there = {s for m in members for s in m.records} | set(range(seen.logged + 1))
            if members and not self.scenario.prompt and not there >= set(range(1, self.scenario.steps + 1)):
                raise Violation(f"finished without the records of all steps: {sorted(there)}")

    def receive(self, world: World, index: int) -> World:
        """A worker's status reaches the controller, with what came of it."""
        worker, seen = world.workers[index], self.machine.seen(world.controller)
        unasked = worker.state != S.RUNNING.value or worker.shares
        sends = index in seen.asked or (unasked and not self.rules.only_reporter_sends_records)
        records = worker.records if sends else ()
        logged = seen.logged
        for step in records:
            if step > logged + 1:
                raise Violation(f"the record of step {logged + 1} is lost")
            logged = max(logged, step)
        kept = tuple(step for step in worker.records if step > logged)
        world = world.with_worker(index, shares=(), records=kept)
        return self.react(world, ("receive", index, worker.status, records, worker.shares))

    # -- what can happen next -------------------------------------------------------------------

    def successors(self, world: World) -> Iterator[Following]:
        """Everything that can happen next in `world`."""
        if world.controller in self.ended:
            return
        count = 0
        for index in range(len(world.workers)):
            for what, after in self._worker_events(world, index):
                count += what != "is built"
                yield f"w{index} {what}", after, False
            yield from self._faults(world, index)
        for what, after in self._time_passes(world):
            count += 1
            yield what, after, False
        seen = self.machine.seen(world.controller)
        for what, after in meetings(world, seen, self.scenario):
            count += 1
            yield what, after, False
        if self.scenario.stop and not seen.stopping:
            yield "the user asks for the end", self.react(world, ("stop",)), True
        if not count and seen.state in (ControllerState.STARTING, ControllerState.REGROUPING):
            # Messages take milliseconds, patience a minute.
            after = self.react(world, ("wait", LONG_S))
            if after != world:
                yield "patience ends", after, False

    def _time_passes(self, world: World) -> Iterator[tuple[str, World]]:
        """Members that stand still, and one that doesn't leave when it is asked to."""
        seen = self.machine.seen(world.controller)
        running = [
            m
            for m in seen.members
            if m not in seen.dead and (s := seen.statuses[m]) is not None and self._counts_as_running(s, seen)
        ]
        if seen.state is ControllerState.ABORTING:
            if running and all(world.workers[m].life == "wedged" for m in running):
                after = self.react(world, ("wait", ABORT_S))
                if after != world:
                    yield "an abort is not followed", after
        stuck = any(world.workers[m].life == "wedged" for m in seen.members)
        said = [m for m in running if seen.statuses[m].state == S.RUNNING.value]  # type: ignore[union-attr]
        if stuck and said and not seen.stalled & set(running):
            yield "the members stand still", self.react(world, ("still", tuple(said)))

    def _counts_as_running(self, status: Any, seen: Seen) -> bool:
        return status.state == S.RUNNING.value or status.generation < seen.generation

    def _worker_events(self, world: World, index: int) -> Iterator[tuple[str, World]]:
        worker, seen = world.workers[index], self.machine.seen(world.controller)
        if index not in seen.dead and (how := self._can_be_found(worker, index, seen)):
            event = ("still", (index,)) if how == "still" else ("lost", index, how)
            if (after := self.react(world, event)) != world:
                yield "is found to be lost", after
        if worker.life in ("up", "wedged"):
            if index not in seen.dead and self._has_news(worker, index, seen):
                yield f"answers: {worker.state}", self.receive(world, index)
            if worker.inbox:
                yield f"gets {worker.inbox[0][0]}", deliver(world, index, self.rules)
        if worker.life not in ("up", "cut"):
            return
        if worker.state == S.STARTING.value:
            yield "is built", world.with_worker(index, state=S.READY.value)
        elif worker.state != S.RUNNING.value:
            if worker.queue:
                yield "takes up its membership", take(world, index, self.rules)
        else:
            yield from moves(world, index, self.scenario, self.rules)

    def _can_be_found(self, worker: Worker, index: int, seen: Seen) -> str:
        if worker.life in ("hung", "cut"):
            return "silent"
        if worker.life == "wedged" and index not in seen.members:
            status = seen.statuses[index]
            return "still" if status is not None and status.state == S.RUNNING.value else ""
        return "gone" if worker.life == "gone" else ""

    def _has_news(self, worker: Worker, index: int, seen: Seen) -> bool:
        known = seen.statuses[index]
        if worker.shares or known is None:
            return True
        if self.scenario.prompt and worker.state == S.RUNNING.value == known.state:
            return worker.status[1::2] != known[1::2] or self._has_received(worker, index, seen)
        return worker.status != known or (index in seen.asked and bool(worker.records))

    def _has_received(self, worker: Worker, index: int, seen: Seen) -> bool:
        """Whether its progress shows that it has received what it was to receive."""
        awaited = any(index == w and worker.step >= step for w, step in seen.awaited)
        return worker.generation == seen.generation and awaited

    def _faults(self, world: World, index: int) -> Iterator[Following]:
        worker, seen = world.workers[index], self.machine.seen(world.controller)
        if worker.leaving and worker.life == "up":
            yield f"w{index} leaves", world._replace(workers=put(world.workers, index, GONE)), True
        if not world.faults or not worker.alive or index in seen.dead:
            return
        spent = world._replace(faults=world.faults - 1)
        for kind in self.scenario.kinds:
            if kind == "kill":
                yield f"w{index} is killed", spent._replace(workers=put(world.workers, index, GONE)), True
            elif kind == "again" and worker.life == "up" and worker.membership is not None:
                inbox = (*worker.inbox, ("join", worker.membership))
                yield f"w{index}'s membership comes once more", spent.with_worker(index, inbox=inbox), True
            elif kind == "torn" and worker.at in ("receive", "reduced"):
                # A connection that ends for no reason, or because a peer was through earlier.
                broken = spent.with_worker(index, state=S.BROKEN.value, at="", asked=False)
                yield f"w{index}'s connection is torn", broken, True
            elif kind == "leave" and worker.life == "up" and not worker.leaving:
                yield f"w{index} will leave", spent.with_worker(index, leaving=True), True
            elif worker.life == "up" and kind in ("hung", "cut"):
                inbox = () if kind == "cut" else worker.inbox
                yield f"w{index} is {kind}", spent.with_worker(index, life=kind, inbox=inbox), True
            elif worker.life == "up" and kind == "wedged" and worker.state == S.RUNNING.value:
                yield f"w{index} is {kind}", spent.with_worker(index, life=kind), True


@dataclasses.dataclass
class Explored:
    """What was visited."""

    worlds: int
    ends: dict[str, int]


def explore(scenario: Scenario, rules: Rules, limit: int = 3_000_000) -> Explored:
    """Visit every world that can be reached.

    Raises Violation, with the shortest way there, when a property fails, when a world
    has no way on (a deadlock), or when the run can go on in circles.
    """
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(scenario, Path(folder))
        with machine.under(rules):
            return _explore(Explorer(scenario, rules, machine), limit)


def _explore(explorer: Explorer, limit: int) -> Explored:
    first = explorer.start()
    known = {first: 0}
    ways: list[tuple[int, str]] = [(-1, "start")]
    edges: list[tuple[int, ...]] = []
    ends: dict[str, int] = {}
    todo = [first]
    for number, world in enumerate(todo):
        following: list[int] = []
        can_go_on = False
        try:
            for what, after, fault in explorer.successors(world):
                can_go_on |= not fault
                if after not in known:
                    known[after] = len(todo)
                    todo.append(after)
                    ways.append((number, what))
                following.append(known[after])
        except Violation as wrong:
            raise Violation(f"{wrong}\n{_story(ways, number)}") from None
        edges.append(tuple(following))
        ended = explorer.ended.get(world.controller)
        if ended:
            ends[ended] = ends.get(ended, 0) + 1
        elif not can_go_on:
            seen = explorer.machine.seen(world.controller)
            raise Violation(f"a deadlock\n{_story(ways, number)}\n{world}\n{seen}")
        assert len(todo) < limit, f"more than {limit} worlds"
    _assert_no_circles(edges)
    return Explored(len(todo), ends)


def _story(ways: list[tuple[int, str]], number: int) -> str:
    lines = []
    while number >= 0:
        number, what = ways[number]
        lines.append(what)
    return "\n".join(reversed(lines))


def _assert_no_circles(edges: list[tuple[int, ...]]) -> None:
    """Every way comes to an end: worlds can be taken away from the beginnings until none is left."""
    incoming = [0] * len(edges)
    for following in edges:
        for number in following:
            incoming[number] += 1
    free = [0]
    taken = 0
    while free:
        taken += 1
        for number in edges[free.pop()]:
            incoming[number] -= 1
            if not incoming[number]:
                free.append(number)
    if taken != len(edges):
        raise Violation("the run can go on in circles")
