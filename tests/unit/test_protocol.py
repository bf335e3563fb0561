"""The membership protocol, explored whole: no interleaving of faults and late messages loses a step or hangs.

Each exploration visits every world that its scenario allows (see `membership.world`);
the rules that are broken on purpose show that it sees what it should.
"""

import dataclasses
from typing import Any

import pytest

from descent.cluster.control import policy
from descent.cluster.control.health import WorkerHealth
from descent.cluster.control.policy import Abort, Decision, Form, Restore, View, Wait, WorkerView
from descent.cluster.control.run_state import RunState
from descent.cluster.workers.group import WorkerInfo
from tests.unit.membership.explore import explore
from tests.unit.membership.world import Rules, Scenario, Violation

SCENARIOS = {
    "a worker alone": Scenario(1, 1, room=1, faults=2),
    "two, late messages, two killed, one more to be had": Scenario(1, 2, room=1),
    "two of two, killed": Scenario(2, 2, room=1),
    "two, told to stop": Scenario(1, 2, faults=1, stop=True),
    "two, one hangs, is cut off, is stuck, loses a connection, or is told twice": Scenario(
        1, 2, room=1, faults=1, kinds=("hung", "cut", "wedged", "torn", "again")
    ),
    "two, two faults of any kind": Scenario(1, 2, kinds=("kill", "hung", "cut", "wedged", "torn"), prompt=True),
    "two, killed while one says goodbye": Scenario(1, 2, kinds=("leave", "kill"), prompt=True),
    "three, two killed": Scenario(1, 3, prompt=True),
    "three of at least two, one killed, one more to be had": Scenario(2, 3, room=1, faults=1, prompt=True),
    "three, one hangs, is cut off, is stuck or loses a connection": Scenario(
        1, 3, faults=1, kinds=("hung", "cut", "wedged", "torn"), prompt=True
    ),
}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS.keys())
def test_no_way_leads_to_a_lost_step_two_generations_or_a_deadlock(scenario: Scenario) -> None:
    explored = explore(scenario, Rules())
    assert explored.ends["FINISHED"] > 0
    assert explored.ends.keys() <= {"FINISHED", "FAILED", "KILLED"}
    # Giving up needs faults that leave too few alive (the model checks that), a stop needs a wish.
    assert ("KILLED" in explored.ends) == scenario.stop


_decide = policy.decide


def _least_advanced_first(view: View) -> Decision:
    decision = _decide(view)
    if isinstance(decision, Form) and len(decision.workers) > 1:
        return dataclasses.replace(decision, workers=decision.workers[::-1])
    return decision


def _nobody_is_behind(view: View) -> Decision:
    decision = _decide(view)
    return dataclasses.replace(decision, behind=()) if isinstance(decision, Form) else decision


def _survivors_are_not_aborted(view: View) -> Decision:
    decision = _decide(view)
    return Wait() if isinstance(decision, Abort) else decision


def _survivors_are_not_waited_for(view: View) -> Decision:
    """As if whoever is still in the broken generation had left it."""
    decision = _decide(view)
    left = [w for w, v in view.workers.items() if w in view.members and v.idle]
    return Form(tuple(left), ()) if isinstance(decision, Abort) and left else decision


def _a_standstill_is_waited_for(view: View) -> Decision:
    workers = {w: dataclasses.replace(v, stalled=False) for w, v in view.workers.items()}
    return _decide(dataclasses.replace(view, workers=workers))


def _restores_too_early(view: View) -> Decision:
    decision = _decide(view)
    some_lost = any(view.workers[w].dead for w in view.members)
    return Restore() if isinstance(decision, Form) and some_lost else decision


def _never_restores_the_checkpoint(view: View) -> Decision:
    decision = _decide(view)
    return dataclasses.replace(decision, restore=False) if isinstance(decision, Form) else decision


_view, _form = RunState.view, RunState.form


def _as_last_reported(state: RunState, worker: WorkerInfo, *, stalled: bool) -> WorkerView:
    view = _view(state, worker, stalled=stalled)
    return view if worker.status is None else dataclasses.replace(view, state=worker.status.state)


def _all_hold_at_once(state: RunState, form: Form, *given: Any) -> Any:
    formed = _form(state, form, *given)
    state._holders |= set(form.workers)
    state._awaited = {}
    return formed


TWO = Scenario(1, 2, room=1, faults=1)
BROKEN: dict[str, tuple[Rules, Scenario, str]] = {
    "the source is the least advanced": (Rules(decide=_least_advanced_first), TWO, "going on from step"),
    "nobody is behind": (Rules(decide=_nobody_is_behind), TWO, "reduce together"),
    "survivors are not aborted": (
        Rules(decide=_survivors_are_not_aborted),
        dataclasses.replace(TWO, kinds=("hung",)),
        "deadlock",
    ),
    "a standstill is waited for": (
        Rules(decide=_a_standstill_is_waited_for),
        dataclasses.replace(TWO, kinds=("wedged",)),
        "deadlock",
    ),
    "survivors are not waited for": (
        Rules(decide=_survivors_are_not_waited_for),
        Scenario(1, 3, faults=1, prompt=True),
        "no such step of the controller",
    ),
    "back to the checkpoint while somebody lives": (Rules(decide=_restores_too_early), TWO, "living worker"),
    "the checkpoint is not restored": (Rules(decide=_never_restores_the_checkpoint), TWO, "going on from step 0"),
    "an idle status of the last generation counts": (
        Rules(mutate=((RunState, "view", _as_last_reported),)),
        TWO,
        "without end",
    ),
    "an older generation is not refused": (
        Rules(refuses_older=False),
        dataclasses.replace(TWO, kinds=("again",)),
        "takes a step after",
    ),
    "an abort is not obeyed": (Rules(obeys_abort=False), dataclasses.replace(TWO, kinds=("hung",)), "deadlock"),
    "who is told to receive holds the state": (
        Rules(mutate=((RunState, "form", _all_hold_at_once),)),
        TWO,
        "going on from step 0",
    ),
    "the state isn't received": (Rules(receives=False), TWO, "reduce together"),
    "the wish for a pause is forgotten": (
        Rules(clears_pause_late=True),
        dataclasses.replace(TWO, stop=True),
        "forgotten",
    ),
    "only the reporter tells its records": (
        Rules(only_reporter_sends_records=True),
        dataclasses.replace(TWO, faults=2),
        "record",
    ),
    "a first answer is waited for without a deadline": (
        Rules(mutate=((WorkerHealth, "not_started", lambda *_: None),)),
        Scenario(2, 2, room=1, faults=1, kinds=("hung",)),
        "deadlock",
    ),
}


@pytest.mark.parametrize(("rules", "scenario", "wrong"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_found(rules: Rules, scenario: Scenario, wrong: str) -> None:
    with pytest.raises(Violation, match=wrong):
        explore(scenario, rules)
