"""The controller's side: the real policy decides, what is done about it mirrors `descent.cluster.control.controller`."""

import dataclasses
import functools
from typing import Any

from descent.cluster.control import policy
from descent.cluster.control.policy import Decision, View, WorkerView
from descent.messages import TerminalState
from tests.unit.membership.workers import delivered
from tests.unit.membership.world import (
    GONE,
    Control,
    Join,
    Rules,
    S,
    Scenario,
    Violation,
    Worker,
    World,
)

_VIEW_FIELDS = {f.name for f in dataclasses.fields(View)}
_MAX_GENERATIONS = 9
"""More than bounded faults can need: beyond it regroups follow each other without end."""


def start(scenario: Scenario, rules: Rules) -> World:
    """All workers of the first generation are being started."""
    worker = Worker(state=S.READY.value) if scenario.prompt else Worker()
    workers = (worker,) * scenario.high
    heard = (worker.told if scenario.prompt else None,) * scenario.high
    world = World(workers, Control(heard=heard), scenario.room, scenario.faults)
    return settle(world, scenario, rules)


@functools.cache
def _decision(c: Control, room: int, scenario: Scenario, rules: Rules, late: bool) -> Decision:
    workers = {}
    for index, told in enumerate(c.heard):
        dead = index in c.dead
        if told is None:
            workers[_name(index)] = WorkerView(S.STARTING, dead)
            continue
        state, generation, step, leaving = told
        if rules.told_is_running and index in c.members and generation < c.generation:
            state = S.RUNNING.value
        more = {"leaving": True} if leaving else {}
        more |= {"stalled": True} if index in c.stalled else {}
        workers[_name(index)] = WorkerView(S(state), dead, generation, (step, step), index in c.joined, **more)
    given = {
        "workers": workers,
        "members": tuple(map(_name, c.members)),
        "generation": c.generation,
        "min_workers": scenario.low,
        "max_workers": scenario.high,
        "stopping": c.stopping,
        "waited_s": 1e9 if late else 0.0,
        "startable": room,
        "saved_step": c.saved,
        "save_tried": c.saving,
    }
    return rules.decide(View(**{k: v for k, v in given.items() if k in _VIEW_FIELDS}))


def _name(index: int) -> str:
    return f"w{index}"


def settle(world: World, scenario: Scenario, rules: Rules, late: bool = False) -> World:
    """Decide and act until there is nothing more to do before something is heard."""
    while not world.control.ended:
        decision = _decision(world.control, world.room, scenario, rules, late)
        after = _act(world, decision, scenario, rules)
        if after == world:
            break
        world = delivered(after, rules) if scenario.prompt else after
    return world


def _act(world: World, decision: Decision, scenario: Scenario, rules: Rules) -> World:
    c = world.control
    if isinstance(decision, policy.Abort) and not c.aborting:
        world = world.with_control(aborting=True)
        return _send(world, map(_index, decision.workers), ("abort", c.generation))
    if isinstance(decision, policy.Pause) and not c.pausing:
        return _send(world.with_control(pausing=True), c.members, ("pause",))
    if isinstance(decision, policy.Form):
        return _form(world, decision, rules)
    if isinstance(decision, policy.Start):
        return _start(world, decision.count)
    if isinstance(decision, policy.Restore):
        given_up = [w.step for i, w in enumerate(world.workers) if w.alive and i not in c.dead]
        if max(given_up, default=0) > max(c.saved, 0):
            raise Violation("a living worker holds more than the checkpoint that is restored")
        return world.with_control(members=(), joined=frozenset(), receiving=(), generation=c.generation + 1)
    if isinstance(decision, policy.End):
        return _end(world, decision, scenario)
    for index in map(_index, getattr(decision, "workers", ())):
        if type(decision).__name__ == "Retire":
            world = world.with_control(dead=world.control.dead | {index})
            world = world._replace(workers=put(world.workers, index, GONE))
    return world


def _index(name: str) -> int:
    return int(name[1:])


def put(workers: tuple[Worker, ...], index: int, worker: Worker) -> tuple[Worker, ...]:
    return (*workers[:index], worker, *workers[index + 1 :])


def _send(world: World, to: Any, message: tuple[Any, ...]) -> World:
    for index in to:
        if world.workers[index].life not in ("gone", "cut"):
            inbox = (*world.workers[index].inbox, message)
            world = world.with_worker(index, inbox=inbox)
    return world


def _start(world: World, count: int) -> World:
    c = world.control
    world = world.with_control(heard=c.heard + (None,) * count)
    return world._replace(workers=world.workers + (Worker(),) * count, room=world.room - count)


def _form(world: World, decision: policy.Form, rules: Rules) -> World:
    c = world.control
    members = tuple(map(_index, decision.workers))
    restore = c.saved if getattr(decision, "restore", False) else -1
    source = max(world.workers[members[0]].step, restore)
    living = [w.step for i, w in enumerate(world.workers) if w.alive and i not in c.dead]
    if world.workers[members[0]].alive and source < max([*living, c.saved]):
        raise Violation(f"going on from step {source}, though step {max([*living, c.saved])} is there")
    if c.generation >= _MAX_GENERATIONS:
        raise Violation("regroups without end")
    save_only = getattr(decision, "save_only", False)
    # A checkpoint nobody holds until all have exchanged what they read of it.
    told = set(members) if restore >= 0 else {members[rank] for rank in decision.behind}
    if rules.holds_when_told:
        told = set()
    world = world.with_control(
        members=members,
        generation=c.generation + 1,
        joined=c.joined | (set(members) - told),
        receiving=tuple((w, source) for w in sorted(told)),
        aborting=False,
        pausing=False,
        stalled=frozenset(),
        saving=save_only,
        parts=frozenset(),
    )
    for rank, index in enumerate(members):
        membership = Join(c.generation + 1, rank, members, decision.behind, restore, save_only)
        world = _send(world, (index,), ("join", membership))
    return world


def _end(world: World, decision: policy.End, scenario: Scenario) -> World:
    c = world.control
    living = [w for i, w in enumerate(world.workers) if w.life in ("up", "wedged") and i not in c.dead]
    if decision.state is TerminalState.FAILED and len(living) + world.room >= scenario.low:
        raise Violation(f"gave up ({decision.reason}) though enough workers live or can be started")
    if decision.state is TerminalState.FINISHED:
        members = [world.workers[m] for m in c.members if world.workers[m].life == "up"]
        if any(m.step != scenario.steps for m in members):
            raise Violation("finished before the last step")
        # What is still missing of the records is fetched from whoever lives.
        told = {s for m in members for s in m.records} | set(range(c.logged + 1))
        if members and not scenario.prompt and not told >= set(range(1, scenario.steps + 1)):
            raise Violation(f"finished without the records of all steps: {sorted(told)}")
    return world.with_control(ended=str(decision.state))


def has_news(world: World, index: int, scenario: Scenario) -> bool:
    worker, c, heard = world.workers[index], world.control, world.control.heard[index]
    if worker.parts or heard is None:
        return True
    if scenario.prompt and worker.state == S.RUNNING.value == heard[0]:
        return worker.told[1::2] != heard[1::2] or _holds(world, index)
    return worker.told != heard or (index in c.asked and bool(worker.records))


def _holds(world: World, index: int) -> bool:
    """Whether its progress tells that it has received what it was to receive."""
    worker, c = world.workers[index], world.control
    return worker.generation == c.generation and any(index == w and worker.step >= step for w, step in c.receiving)


def can_be_found(world: World, index: int, rules: Rules) -> bool:
    worker = world.workers[index]
    if worker.life in ("hung", "cut"):
        return world.control.heard[index] is not None or not rules.waits_for_first_answer
    if worker.life == "wedged":
        # Its peers stand still with it: only when they have been told to leave it is the one that stays.
        return world.control.aborting or index not in world.control.members
    return worker.life == "gone"


def stands_still(world: World, scenario: Scenario, rules: Rules) -> World | None:
    """Afterwards, where a member is stuck: its peers wait for it, and none of them makes progress."""
    c = world.control
    stuck = any(world.workers[m].life == "wedged" for m in c.members)
    heard = {m: c.heard[m] for m in c.members if m not in c.dead}
    stalled = frozenset(m for m, told in heard.items() if told and told[0] == S.RUNNING.value)
    if not stuck or not stalled or c.aborting or c.stalled:
        return None
    return settle(world.with_control(stalled=stalled), scenario, rules)


def hear(world: World, index: int, rules: Rules) -> World:
    worker, c = world.workers[index], world.control
    logged = c.logged
    unasked = worker.state != S.RUNNING.value or worker.parts
    if index in c.asked or (unasked and not rules.only_reporter_tells):
        for step in worker.records:
            if step > logged + 1:
                raise Violation(f"the record of step {logged + 1} is lost")
            logged = max(logged, step)
    saved, parts = c.saved, c.parts | set(worker.parts)
    for generation, step, _, size in worker.parts:
        if all((generation, step, r, size) in parts for r in range(size)):
            saved = max(saved, step)
    holds = _holds(world, index)
    world = world.with_worker(index, parts=(), records=tuple(s for s in worker.records if s > logged))
    reporter = next((m for m in c.members if m not in c.dead), None)
    return world.with_control(
        heard=(*c.heard[:index], worker.told, *c.heard[index + 1 :]),
        logged=logged,
        saved=saved,
        parts=parts,
        joined=c.joined | {index} if holds else c.joined,
        receiving=tuple(r for r in c.receiving if not holds or r[0] != index),
        asked=c.asked | {index} if index == reporter else c.asked - {index},
    )
