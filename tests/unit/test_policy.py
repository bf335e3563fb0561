"""What is done next, as a table; and what must hold in any situation."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from descent.cluster.control.policy import (
    Abort,
    Decision,
    End,
    Form,
    Pause,
    Restore,
    Retire,
    Start,
    View,
    Wait,
    WorkerView,
    decide,
)
from descent.messages import TerminalState, WorkerState
from descent.training.slot_balancer import assign_slots

S = WorkerState


def member(state: WorkerState, step: int = 0, evaluated: int = -1, *, dead: bool = False) -> WorkerView:
    return WorkerView(state, dead, 1, (step, evaluated), holds_state=True)


def failed(kind: str, step: int) -> WorkerView:
    return WorkerView(S.FAILED, False, 1, (step - 1, -1), holds_state=True, failure=(kind, step))


def leaving(state: WorkerState, step: int = 0) -> WorkerView:
    return replace(member(state, step), leaving=True)


def stalled(step: int = 0) -> WorkerView:
    return replace(member(S.RUNNING, step), stalled=True)


def slow(state: WorkerState, step: int = 0) -> WorkerView:
    return replace(member(state, step), slow=True)


def fresh(state: WorkerState) -> WorkerView:
    return WorkerView(state)


def view(members: str = "", **given: object) -> View:
    workers = {k: v for k, v in given.items() if isinstance(v, WorkerView)}
    options = {k: v for k, v in given.items() if k not in workers}
    return View(
        workers,
        tuple(members),
        **{"min_workers": 1, "max_workers": 2, "generation": 1 if members else 0, **options},  # type: ignore[arg-type]
    )


TABLE: list[tuple[str, View, Decision]] = [
    ("at the start all are waited for", view(a=fresh(S.READY), b=fresh(S.STARTING)), Wait()),
    ("then the first generation is formed", view(a=fresh(S.READY), b=fresh(S.READY)), Form(("a", "b"), (1,))),
    ("but not for ever", view(a=fresh(S.READY), b=fresh(S.STARTING), waited_s=61.0), Form(("a",), ())),
    ("while all is well nothing is done", view("ab", a=member(S.RUNNING), b=member(S.RUNNING)), Wait()),
    ("a member died: the others leave", view("ab", a=member(S.RUNNING), b=member(S.RUNNING, dead=True)), Abort(("a",))),
    ("a member is broken: the others leave", view("ab", a=member(S.RUNNING), b=member(S.BROKEN)), Abort(("a",))),
    ("a survivor goes on alone", view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True)), Form(("a",), ())),
    (
        "the most advanced is the source",
        view("ab", a=member(S.BROKEN, 7), b=member(S.BROKEN, 8)),
        Form(("b", "a"), (1,)),
    ),
    (
        "also if it is ahead by an evaluation only",
        view("ab", a=member(S.BROKEN, 7, 0), b=member(S.BROKEN, 7, 7)),
        Form(("b", "a"), (1,)),
    ),
    (
        "survivors that are level need not send",
        view("ab", a=member(S.BROKEN, 7), b=member(S.BROKEN, 7)),
        Form(("a", "b"), ()),
    ),
    (
        "too few survive: they hold their state and wait",
        view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True), min_workers=2),
        Wait(),
    ),
    (
        "and more are started where there is room",
        view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True), min_workers=2, startable=3),
        Start(1),
    ),
    (
        "until patience ends",
        view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True), min_workers=2, waited_s=61.0),
        Form(("a",), (), save_only=True),
    ),
    (
        "and once the state is saved, the run ends",
        view("a", a=member(S.PAUSED, 7), min_workers=2, saved_step=7, save_tried=True),
        End(TerminalState.FAILED, "only 1 of at least 2 workers could be had for 60 s"),
    ),
    (
        "also if it could not be saved",
        view("a", a=member(S.PAUSED, 7), min_workers=2, saved_step=3, save_tried=True),
        End(TerminalState.FAILED, "only 1 of at least 2 workers could be had for 60 s"),
    ),
    (
        "unless somebody has come in the meantime",
        view("a", a=member(S.PAUSED, 7), b=fresh(S.READY), min_workers=2, saved_step=7, save_tried=True),
        Form(("a", "b"), (1,)),
    ),
    ("a replacement is started while the others train", view("a", a=member(S.RUNNING), startable=1), Start(1)),
    ("it joins at a pause", view("a", a=member(S.RUNNING), b=fresh(S.READY)), Pause("grow")),
    ("and receives the state", view("a", a=member(S.PAUSED, 9, 5), b=fresh(S.READY)), Form(("a", "b"), (1,))),
    (
        "all are gone: back to the checkpoint",
        view("ab", a=member(S.RUNNING, dead=True), b=member(S.RUNNING, dead=True)),
        Restore(),
    ),
    (
        "also when only a newcomer without state lives",
        view("a", a=member(S.RUNNING, dead=True), b=fresh(S.READY)),
        Restore(),
    ),
    (
        "with a spare and a checkpoint too: the spare takes it from there",
        view("", b=fresh(S.READY), a=fresh(S.STARTING), generation=3, saved_step=40),
        Form(("b",), (), restore=True),
    ),
    (
        "one worker's code fails: the others leave first",
        view("ab", a=failed("ValueError", 4), b=member(S.RUNNING)),
        Abort(("b",)),
    ),
    (
        "it alone failed, for the first time: perhaps its machine is to blame",
        view("ab", a=failed("ValueError", 4), b=member(S.BROKEN, 3)),
        Retire(("a",)),
    ),
    (
        "the same exception at the same step again",
        view("bc", b=failed("ValueError", 4), c=member(S.BROKEN, 3), earlier=frozenset({("ValueError", 4)})),
        End(TerminalState.FAILED, "a worker's code failed"),
    ),
    (
        "another exception, or another step, is another accident",
        view("bc", b=failed("ValueError", 9), c=member(S.BROKEN, 8), earlier=frozenset({("ValueError", 4)})),
        Retire(("b",)),
    ),
    (
        "all members raise the same",
        view("ab", a=failed("ValueError", 4), b=failed("ValueError", 4)),
        End(TerminalState.FAILED, "a worker's code failed"),
    ),
    (
        "nobody makes progress: all leave, who is stuck shows itself",
        view("ab", a=stalled(6), b=stalled(6)),
        Abort(("a", "b")),
    ),
    (
        "also if only one of them is known to stand still",
        view("ab", a=member(S.RUNNING, 6), b=stalled(6)),
        Abort(("a", "b")),
    ),
    ("who has left waits for the one that is stuck", view("ab", a=member(S.BROKEN, 6), b=stalled(6)), Abort(("b",))),
    ("and goes on without it", view("ab", a=member(S.BROKEN, 6), b=replace(stalled(6), dead=True)), Form(("a",), ())),
    (
        "a worker that can't even be built",
        view(a=WorkerView(S.FAILED, failure=("ImportError", 1)), b=fresh(S.STARTING)),
        End(TerminalState.FAILED, "a worker's code failed"),
    ),
    (
        "a replacement that can't be built is let go while the others train",
        view("a", a=member(S.RUNNING), b=WorkerView(S.FAILED, failure=("OSError", 1))),
        Retire(("b",)),
    ),
    ("a member says goodbye: the others pause", view("ab", a=member(S.RUNNING), b=leaving(S.RUNNING)), Pause("drain")),
    ("and go on without it", view("ab", a=member(S.PAUSED, 5), b=leaving(S.PAUSED, 5)), Form(("a",), ())),
    (
        "unless it alone has committed the last step",
        view("ab", a=member(S.BROKEN, 5), b=leaving(S.BROKEN, 6)),
        Form(("b", "a"), (1,)),
    ),
    ("then it is let go", view("a", a=member(S.RUNNING), b=leaving(S.PAUSED, 5)), Retire(("b",))),
    (
        "too few would be left: it stays as long as it lives, and a replacement is started",
        view("ab", a=member(S.RUNNING), b=leaving(S.RUNNING), min_workers=2, startable=1),
        Start(1),
    ),
    (
        "which takes its place",
        view("ab", a=member(S.RUNNING), b=leaving(S.RUNNING), c=fresh(S.READY), min_workers=2),
        Pause("drain"),
    ),
    (
        "only it holds the state, which is saved: the others take it from the checkpoint",
        view("a", a=leaving(S.PAUSED, 5), b=fresh(S.READY), saved_step=5),
        Form(("b",), (), restore=True),
    ),
    (
        "only it holds the state, which isn't saved yet",
        view("a", a=leaving(S.PAUSED, 5), b=fresh(S.READY), saved_step=3),
        Form(("a",), (), save_only=True),
    ),
    (
        "and could not be saved: it hands it on",
        view("a", a=leaving(S.PAUSED, 5), b=fresh(S.READY), saved_step=3, save_tried=True),
        Form(("a", "b"), (1,)),
    ),
    (
        "spares are started beyond the workers",
        view("ab", a=member(S.RUNNING), b=member(S.RUNNING), spares=1, startable=3),
        Start(1),
    ),
    ("and wait", view("ab", a=member(S.RUNNING), b=member(S.RUNNING), c=fresh(S.READY), spares=1, startable=3), Wait()),
    (
        "until one is lost",
        view("ab", a=member(S.BROKEN, 7), b=member(S.RUNNING, dead=True), c=fresh(S.READY), spares=1),
        Form(("a", "c"), (1,)),
    ),
    (
        "a run is asked to shrink",
        view("abc", a=member(S.RUNNING), b=member(S.RUNNING), c=member(S.RUNNING)),
        Pause("shrink"),
    ),
    (
        "and does at a step's end",
        view("abc", a=member(S.PAUSED, 4), b=member(S.PAUSED, 4), c=member(S.PAUSED, 4)),
        Form(("a", "b"), ()),
    ),
    (
        "whoever is left over is let go",
        view("ab", a=member(S.RUNNING), b=member(S.RUNNING), c=member(S.PAUSED, 4)),
        Retire(("c",)),
    ),
    (
        "a straggler is replaced once somebody can take its place",
        view("ab", a=member(S.RUNNING), b=slow(S.RUNNING), startable=1),
        Start(1),
    ),
    ("who then does", view("ab", a=member(S.RUNNING), b=slow(S.RUNNING), c=fresh(S.READY)), Pause("replace")),
    (
        "and is a member of the next generation",
        view("ab", a=member(S.PAUSED, 4), b=slow(S.PAUSED, 4), c=fresh(S.READY)),
        Form(("a", "c"), (1,)),
    ),
    (
        "too many crashes",
        view("a", a=member(S.RUNNING), failures=9),
        End(TerminalState.FAILED, "9 failures, regroup.max_failures=8"),
    ),
    ("a stop is a pause first", view("a", a=member(S.RUNNING), stopping=True), Pause("stop")),
    (
        "and then the end",
        view("a", a=member(S.PAUSED, 3), stopping=True),
        End(TerminalState.KILLED, "stopped on request"),
    ),
    (
        "with a reason it is an end like any other",
        view("a", a=member(S.PAUSED, 3), stopping=True, stop_reason="good enough"),
        End(TerminalState.FINISHED, "good enough"),
    ),
    (
        "but not before anything was trained",
        view(a=fresh(S.STARTING), stopping=True, stop_reason="good enough"),
        End(TerminalState.KILLED, "stopped on request"),
    ),
    (
        "a stop in the middle of a fault: the state is saved first",
        view("ab", a=member(S.BROKEN, 3), b=member(S.RUNNING, dead=True), stopping=True),
        Form(("a",), (), save_only=True),
    ),
    (
        "a stop before anything started",
        view(a=fresh(S.STARTING), stopping=True),
        End(TerminalState.KILLED, "stopped on request"),
    ),
    ("all are finished", view("ab", a=member(S.FINISHED, 9), b=member(S.FINISHED, 9)), End(TerminalState.FINISHED)),
    (
        "one finished, one died before it could: the last step is saved again",
        view("ab", a=member(S.FINISHED, 9), b=member(S.RUNNING, 9, dead=True)),
        Form(("a",), ()),
    ),
]


@pytest.mark.parametrize(("situation", "wanted"), [r[1:] for r in TABLE], ids=[r[0] for r in TABLE])
def test_decisions(situation: View, wanted: Decision) -> None:
    assert decide(situation) == wanted


@st.composite
def views(draw: st.DrawFn) -> View:
    names = [f"w{i}" for i in range(draw(st.integers(0, 5)))]
    members = tuple(draw(st.permutations(names))[: draw(st.integers(0, len(names)))])
    workers = {}
    for name in names:
        holds_state = name in members or draw(st.booleans())
        progress = (draw(st.integers(0, 3)), draw(st.integers(-1, 3))) if holds_state else (0, -1)
        state = draw(st.sampled_from(list(WorkerState)))
        failure = ("ValueError", progress[0] + 1) if state is S.FAILED else None
        workers[name] = WorkerView(
            state,
            draw(st.booleans()),
            draw(st.integers(-1, 3)),
            progress,
            holds_state,
            draw(st.booleans()),
            draw(st.booleans()),
            draw(st.booleans()),
            failure,
        )
    low = draw(st.integers(1, 4))
    return View(
        workers,
        members,
        draw(st.integers(0, 3)),
        low,
        draw(st.integers(low, 5)),
        failures=draw(st.integers(0, 10)),
        stopping=draw(st.booleans()),
        waited_s=draw(st.sampled_from([0.0, 61.0])),
        startable=draw(st.integers(0, 4)),
        spares=draw(st.integers(0, 2)),
        saved_step=draw(st.integers(-1, 3)),
        save_tried=draw(st.booleans()),
    )


@given(views())
def test_whatever_the_situation(situation: View) -> None:
    decision = decide(situation)
    assert decide(situation) == decision
    workers = situation.workers
    running = [w for w in situation.members if workers[w].state is S.RUNNING and not workers[w].dead]
    if isinstance(decision, Form):
        chosen = [workers[w] for w in decision.workers]
        assert chosen and len(set(decision.workers)) == len(chosen) <= situation.max_workers
        assert all(w.idle for w in chosen) and not running
        source = chosen[0]
        if any(w.holds_state for w in chosen):
            assert source.holds_state
            assert source.progress == max(w.progress for w in workers.values() if w.idle and w.holds_state)
        else:
            # Nobody's step is thrown away: it is in the checkpoint that they begin with.
            assert decision.restore == (situation.saved_step >= 0)
            assert all(w.progress[0] <= situation.saved_step for w in workers.values() if w.idle and w.holds_state)
        assert not (decision.restore and source.holds_state)
        if decision.save_only:
            assert len(chosen) == 1 and source.progress[0] > situation.saved_step
        level = [i for i, w in enumerate(chosen) if w.holds_state and w.progress == source.progress]
        assert set(decision.behind).isdisjoint(level) or not source.holds_state
        assert set(decision.behind) | set(level) | {0} == set(range(len(chosen)))
        assert 0 not in decision.behind
    if isinstance(decision, Abort):
        assert set(decision.workers) == set(running)
    if running and any(workers[w].stalled for w in running):
        assert isinstance(decision, Abort | End)
    if decision == End(TerminalState.FINISHED):
        assert situation.members and all(
            workers[w].state is S.FINISHED and not workers[w].dead for w in situation.members
        )
    if isinstance(decision, End) and decision.state is TerminalState.KILLED:
        assert situation.stopping and not running
    if isinstance(decision, Pause):
        assert running
    if isinstance(decision, Start):
        staying = sum(w.staying for w in workers.values())
        room = situation.max_workers + situation.spares - staying
        assert 0 < decision.count <= min(situation.startable, room)
    if isinstance(decision, Retire):
        assert not set(decision.workers) & set(running)
        assert not any(workers[w].dead for w in decision.workers)
    if isinstance(decision, Restore):
        assert not any(w.idle and w.holds_state for w in workers.values())


@given(st.integers(1, 40), st.integers(1, 40))
def test_slots_are_dealt_in_order_and_evenly(slots: int, world: int) -> None:
    world = min(world, slots)
    ranges = assign_slots(slots, world)
    assert [s for lo, hi in ranges for s in range(lo, hi)] == list(range(slots))
    sizes = [hi - lo for lo, hi in ranges]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
