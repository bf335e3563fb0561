"""Every world that can be reached, breadth first; the shortest way to whatever is wrong."""

import dataclasses
from collections.abc import Iterator

from tests.unit.membership.controller import (
    can_be_found,
    has_news,
    hear,
    put,
    settle,
    stands_still,
    start,
)
from tests.unit.membership.workers import deliver, meetings, moves, take
from tests.unit.membership.world import GONE, Rules, S, Scenario, Violation, Worker, World

Event = tuple[str, World, bool]
"""(what happens, the world afterwards, whether it is a fault and so need not happen)."""


def successors(world: World, scenario: Scenario, rules: Rules) -> Iterator[Event]:
    """Everything that can happen next in `world`."""
    if world.control.ended:
        return
    count = 0
    for index in range(len(world.workers)):
        for what, after in _worker_events(world, index, scenario, rules):
            count += what != "is built"
            yield f"w{index} {what}", after, False
        yield from _faults(world, index, scenario)
    if (standing := stands_still(world, scenario, rules)) is not None:
        count += 1
        yield "the members stand still", standing, False
    for what, after in meetings(world, scenario):
        count += 1
        yield what, after, False
    if scenario.stop and not world.control.stopping:
        after = settle(world.with_control(stopping=True), scenario, rules)
        yield "the user asks for the end", after, True
    if not count:  # messages take milliseconds, patience a minute
        after = settle(world, scenario, rules, late=True)
        if after != world:
            yield "patience ends", after, False


def _faults(world: World, index: int, scenario: Scenario) -> Iterator[Event]:
    worker = world.workers[index]
    if worker.leaving and worker.life == "up":
        yield f"w{index} leaves", world._replace(workers=_lose(world, index)), True
    if not world.faults or not worker.alive or index in world.control.dead:
        return
    spent = world._replace(faults=world.faults - 1)
    for kind in scenario.kinds:
        if kind == "kill":
            yield f"w{index} is killed", spent._replace(workers=_lose(world, index)), True
        elif kind == "again" and worker.life == "up" and worker.membership is not None:
            inbox = (*worker.inbox, ("join", worker.membership))
            yield (
                f"w{index}'s membership comes once more",
                spent.with_worker(index, inbox=inbox),
                True,
            )
        elif kind == "torn" and world.workers[index].at in ("receive", "reduced"):
            # A connection that ends for no reason, or because a peer was through earlier.
            broken = spent.with_worker(index, state=S.BROKEN.value, at="", asked=False)
            yield f"w{index}'s connection is torn", broken, True
        elif kind == "leave" and worker.life == "up" and not worker.leaving:
            yield f"w{index} is told to leave", spent.with_worker(index, leaving=True), True
        elif worker.life == "up" and kind in ("hung", "cut"):
            inbox = () if kind == "cut" else worker.inbox
            yield f"w{index} is {kind}", spent.with_worker(index, life=kind, inbox=inbox), True
        elif worker.life == "up" and kind == "wedged" and worker.state == S.RUNNING.value:
            yield f"w{index} is {kind}", spent.with_worker(index, life=kind), True


def _lose(world: World, index: int) -> tuple[Worker, ...]:
    return put(world.workers, index, GONE)


def _worker_events(world: World, index: int, scenario: Scenario, rules: Rules) -> Iterator[tuple[str, World]]:
    worker, c = world.workers[index], world.control
    known_dead = index in c.dead
    if not known_dead and can_be_found(world, index, rules):
        life = "cut" if worker.life == "cut" else "gone"
        workers = put(world.workers, index, worker if life == "cut" else GONE)
        found = world._replace(workers=workers).with_control(dead=c.dead | {index})
        yield "is found to be lost", settle(found, scenario, rules)
    if worker.life in ("up", "wedged"):
        if not known_dead and has_news(world, index, scenario):
            yield f"is heard: {worker.state}", settle(hear(world, index, rules), scenario, rules)
        if worker.inbox:
            yield f"gets {worker.inbox[0][0]}", deliver(world, index, rules)
    if worker.life not in ("up", "cut"):
        return
    if worker.state == S.STARTING.value:
        yield "is built", world.with_worker(index, state=S.READY.value)
    elif worker.state != S.RUNNING.value:
        if worker.queue:
            yield "takes up its membership", take(world, index, rules)
    else:
        yield from moves(world, index, scenario, rules)


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
    first = start(scenario, rules)
    known = {first: 0}
    ways: list[tuple[int, str]] = [(-1, "start")]
    edges: list[tuple[int, ...]] = []
    ends: dict[str, int] = {}
    todo = [first]
    for number, world in enumerate(todo):
        following: list[int] = []
        can_go_on = False
        try:
            for what, after, fault in successors(world, scenario, rules):
                can_go_on |= not fault
                if after not in known:
                    known[after] = len(todo)
                    todo.append(after)
                    ways.append((number, what))
                following.append(known[after])
        except Violation as wrong:
            raise Violation(f"{wrong}\n{_story(ways, number)}") from None
        edges.append(tuple(following))
        ended = world.control.ended
        if ended:
            ends[ended] = ends.get(ended, 0) + 1
        elif not can_go_on:
            raise Violation(f"a deadlock\n{_story(ways, number)}\n{world}")
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
