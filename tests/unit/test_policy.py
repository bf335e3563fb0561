"""What is done next, as a table; and what must hold in any situation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cluster.policy import (
    Abort,
    Decision,
    End,
    Form,
    Pause,
    Restore,
    Start,
    View,
    Wait,
    WorkerView,
    deal_slots,
    decide,
)
from service.messages import RunState, WorkerState

S = WorkerState


def member(
    state: WorkerState, step: int = 0, evaluated: int = -1, *, dead: bool = False
) -> WorkerView:
    return WorkerView(state, dead, 1, (step, evaluated), joined=True)


def fresh(state: WorkerState) -> WorkerView:
    return WorkerView(state)


def view(members: str = "", **given: object) -> View:
    workers = {k: v for k, v in given.items() if isinstance(v, WorkerView)}
    options = {k: v for k, v in given.items() if k not in workers}
    return View(
        workers, tuple(members), generation=1 if members else 0,
        **{"min_workers": 1, "max_workers": 2, **options},  # type: ignore[arg-type]
    )  # fmt: skip


TABLE: list[tuple[str, View, Decision]] = [
    ("at the start all are waited for",
     view(a=fresh(S.READY), b=fresh(S.STARTING)), Wait()),
    ("then the first generation is formed",
     view(a=fresh(S.READY), b=fresh(S.READY)), Form(("a", "b"), (1,))),
    ("but not for ever",
     view(a=fresh(S.READY), b=fresh(S.STARTING), waited_s=61.0), Form(("a",), ())),
    ("while all is well nothing is done",
     view("ab", a=member(S.RUNNING), b=member(S.RUNNING)), Wait()),
    ("a member died: the others leave",
     view("ab", a=member(S.RUNNING), b=member(S.RUNNING, dead=True)), Abort(("a",))),
    ("a member is broken: the others leave",
     view("ab", a=member(S.RUNNING), b=member(S.BROKEN)), Abort(("a",))),
    ("a survivor goes on alone",
     view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True)), Form(("a",), ())),
    ("the most advanced is the source",
     view("ab", a=member(S.BROKEN, 7), b=member(S.BROKEN, 8)), Form(("b", "a"), (1,))),
    ("also if it is ahead by an evaluation only",
     view("ab", a=member(S.BROKEN, 7, 0), b=member(S.BROKEN, 7, 7)), Form(("b", "a"), (1,))),
    ("survivors that are level need not send",
     view("ab", a=member(S.BROKEN, 7), b=member(S.BROKEN, 7)), Form(("a", "b"), ())),
    ("too few survive: they hold their state and wait",
     view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True), min_workers=2), Wait()),
    ("and more are started where there is room",
     view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True), min_workers=2, startable=3), Start(1)),
    ("until patience ends",
     view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True), min_workers=2, waited_s=61.0),
     End(RunState.FAILED, "only 1 of at least 2 workers could be had for 60 s")),
    ("a replacement is started while the others train",
     view("a", a=member(S.RUNNING), startable=1), Start(1)),
    ("it joins at a pause",
     view("a", a=member(S.RUNNING), b=fresh(S.READY)), Pause("grow")),
    ("and receives the state",
     view("a", a=member(S.PAUSED, 9, 5), b=fresh(S.READY)), Form(("a", "b"), (1,))),
    ("all are gone: back to the checkpoint",
     view("ab", a=member(S.RUNNING, dead=True), b=member(S.RUNNING, dead=True)), Restore()),
    ("also when only a newcomer without state lives",
     view("a", a=member(S.RUNNING, dead=True), b=fresh(S.READY)), Restore()),
    ("user code fails: no retry",
     view("ab", a=member(S.FAILED), b=member(S.RUNNING)), End(RunState.FAILED, "a worker's code failed")),
    ("too many crashes",
     view("a", a=member(S.RUNNING), failures=9), End(RunState.FAILED, "9 failures, regroup.max_failures=8")),
    ("a stop is a pause first",
     view("a", a=member(S.RUNNING), stopping=True), Pause("stop")),
    ("and then the end",
     view("a", a=member(S.PAUSED, 3), stopping=True), End(RunState.KILLED, "stopped on request")),
    ("a stop in the middle of a fault: once more, so that the state can be saved",
     view("ab", a=member(S.BROKEN, 3), b=member(S.RUNNING, dead=True), stopping=True), Form(("a",), ())),
    ("a stop before anything started",
     view(a=fresh(S.STARTING), stopping=True), End(RunState.KILLED, "stopped on request")),
    ("all are finished",
     view("ab", a=member(S.FINISHED, 9), b=member(S.FINISHED, 9)), End(RunState.FINISHED)),
    ("one finished, one died before it could: the last step is saved again",
     view("ab", a=member(S.FINISHED, 9), b=member(S.RUNNING, 9, dead=True)), Form(("a",), ())),
]  # fmt: skip


@pytest.mark.parametrize(("situation", "wanted"), [r[1:] for r in TABLE], ids=[r[0] for r in TABLE])
def test_decisions(situation: View, wanted: Decision) -> None:
    assert decide(situation) == wanted


@st.composite
def views(draw: st.DrawFn) -> View:
    names = [f"w{i}" for i in range(draw(st.integers(0, 5)))]
    members = tuple(draw(st.permutations(names))[: draw(st.integers(0, len(names)))])
    workers = {}
    for name in names:
        joined = name in members or draw(st.booleans())
        progress = (draw(st.integers(0, 3)), draw(st.integers(-1, 3))) if joined else (0, -1)
        workers[name] = WorkerView(
            draw(st.sampled_from(list(WorkerState))), draw(st.booleans()), draw(st.integers(-1, 3)),
            progress, joined,
        )  # fmt: skip
    low = draw(st.integers(1, 4))
    return View(
        workers, members, draw(st.integers(0, 3)), low, draw(st.integers(low, 5)),
        failures=draw(st.integers(0, 10)), stopping=draw(st.booleans()),
        waited_s=draw(st.sampled_from([0.0, 61.0])), startable=draw(st.integers(0, 4)),
    )  # fmt: skip


@given(views())
def test_whatever_the_situation(situation: View) -> None:
    decision = decide(situation)
    assert decide(situation) == decision
    workers = situation.workers
    running = [
        w for w in situation.members if workers[w].state is S.RUNNING and not workers[w].dead
    ]
    if isinstance(decision, Form):
        chosen = [workers[w] for w in decision.workers]
        assert chosen and len(set(decision.workers)) == len(chosen) <= situation.max_workers
        assert all(w.idle for w in chosen) and not running
        source = chosen[0]
        if any(w.joined for w in chosen):
            assert source.joined
            assert source.progress == max(
                w.progress for w in workers.values() if w.idle and w.joined
            )
        level = [i for i, w in enumerate(chosen) if w.joined and w.progress == source.progress]
        assert set(decision.behind).isdisjoint(level) or not source.joined
        assert set(decision.behind) | set(level) | {0} == set(range(len(chosen)))
        assert 0 not in decision.behind
    if isinstance(decision, Abort):
        assert set(decision.workers) == set(running)
    if decision == End(RunState.FINISHED):
        assert situation.members and all(
            workers[w].state is S.FINISHED and not workers[w].dead for w in situation.members
        )
    if isinstance(decision, End) and decision.state is RunState.KILLED:
        assert situation.stopping and not running
    if isinstance(decision, Pause):
        assert running
    if isinstance(decision, Start):
        alive = sum(not w.dead for w in workers.values())
        assert 0 < decision.count <= min(situation.startable, situation.max_workers - alive)
    if isinstance(decision, Restore):
        assert not any(w.idle and w.joined for w in workers.values())


@given(st.integers(1, 40), st.integers(1, 40))
def test_slots_are_dealt_in_order_and_evenly(slots: int, world: int) -> None:
    world = min(world, slots)
    ranges = deal_slots(slots, world)
    assert [s for lo, hi in ranges for s in range(lo, hi)] == list(range(slots))
    sizes = [hi - lo for lo, hi in ranges]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
