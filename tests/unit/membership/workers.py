"""The workers' side: what becomes of a message, what a member does next by itself, what all do at once."""

from collections.abc import Iterator

from descent.messages import WorkerState
from tests.unit.membership.machine import Seen
from tests.unit.membership.world import Join, Rules, S, Scenario, Violation, Worker, World


def put(workers: tuple[Worker, ...], index: int, worker: Worker) -> tuple[Worker, ...]:
    return (*workers[:index], worker, *workers[index + 1 :])


def delivered(world: World, rules: Rules) -> World:
    """All messages but requests for a pause, taken up at once."""
    for index in range(len(world.workers)):
        while (worker := world.workers[index]).life == "up":
            if worker.inbox and worker.inbox[0][0] != "pause":
                world = deliver(world, index, rules)
            elif worker.queue and worker.state not in (S.STARTING.value, S.RUNNING.value):
                world = take(world, index, rules)
            else:
                break
    return world


def deliver(world: World, index: int, rules: Rules) -> World:
    worker = world.workers[index]
    message, inbox = worker.inbox[0], worker.inbox[1:]
    world = world.with_worker(index, inbox=inbox)
    if message[0] == "join":
        if rules.refuses_older and message[1].generation <= worker.generation:
            return world
        pause = worker.pause and rules.clears_pause_late
        return world.with_worker(index, abort=False, pause=pause, asked=False, queue=(*worker.queue, message[1]))
    if message[0] == "abort":
        return world.with_worker(index, abort=message[1] >= worker.generation and rules.obeys_abort)
    return world.with_worker(index, pause=True, asked=True)


def take(world: World, index: int, rules: Rules) -> World:
    worker = world.workers[index]
    membership = worker.queue[0]
    return world.with_worker(
        index,
        queue=worker.queue[1:],
        membership=membership,
        state=S.RUNNING.value,
        at="meet",
        pause=worker.pause and not rules.clears_pause_late,
    )


def moves(world: World, index: int, scenario: Scenario, rules: Rules) -> Iterator[tuple[str, World]]:
    """What the training thread of a member does next by itself."""
    worker = world.workers[index]
    here = worker.membership
    assert here is not None
    if worker.abort or (_is_talking(worker, scenario) and _has_lost_a_peer(world, here)):
        yield "breaks", world.with_worker(index, state=S.BROKEN.value, at="", asked=False)
    if worker.at == "receive":
        step = worker.incoming if rules.receives else worker.step
        yield "receives", world.with_worker(index, step=step, at="compute", incoming=0)
    if worker.at == "compute" and worker.step == scenario.steps:
        # Nothing is left to compute; only the end's checkpoint.
        yield "finishes", _leave(world, index, S.FINISHED)
    if worker.at == "reduced":
        step = worker.step + 1
        records = () if scenario.prompt else (*worker.records, step)
        after = world.with_worker(index, step=step, at="compute", votes=False, records=records)
        if step == scenario.steps:
            yield "commits the last step", _leave(after, index, S.FINISHED)
        elif worker.votes:
            yield "commits and pauses", _leave(after, index, S.PAUSED)
        else:
            yield "commits", _write(after, index) if step % scenario.save_every == 0 else after


def _is_talking(worker: Worker, scenario: Scenario) -> bool:
    """Whether it waits for others inside a collective, or is about to; in the store it only waits."""
    return worker.at in ("receive", "reduced") or (worker.at == "compute" and worker.step < scenario.steps)


def _has_lost_a_peer(world: World, here: Join) -> bool:
    """Whether a connection has ended without the generation having come to its end for the peer."""
    peers = [world.workers[m] for m in here.members]
    return any(not p.alive or p.generation != here.generation or p.state == S.BROKEN.value for p in peers)


def _write(world: World, index: int) -> World:
    worker = world.workers[index]
    here = worker.membership
    assert here is not None
    share = (here.generation, worker.step, here.rank, len(here.members))
    return world.with_worker(index, shares=(*worker.shares, share))


def _leave(world: World, index: int, state: WorkerState) -> World:
    return _write(world, index).with_worker(index, state=state.value, at="", asked=False)


def meetings(world: World, seen: Seen, scenario: Scenario) -> Iterator[tuple[str, World]]:
    """What happens between all members of a generation at once: they meet, or a reduction is whole."""
    for worker in world.workers:
        here = worker.membership
        if here is None or here.rank != 0 or worker.state != S.RUNNING.value:
            continue
        peers = [world.workers[m] for m in here.members]
        together = all(
            p.life in ("up", "cut")
            and p.state == S.RUNNING.value
            and p.generation == here.generation
            and p.at == worker.at
            for p in peers
        )
        if not together:
            continue
        if worker.at == "meet":
            yield f"generation {here.generation} meets", _meet(world, here)
        elif worker.at == "compute" and worker.step < scenario.steps:
            yield f"generation {here.generation} reduces", _reduce(world, seen, here, peers)


def _meet(world: World, here: Join) -> World:
    source = world.workers[here.members[0]]
    for rank, index in enumerate(here.members):
        if here.save_only:
            world = _leave(world, index, S.PAUSED)
        elif here.restore >= 0:
            world = world.with_worker(index, at="receive", incoming=here.restore)
        elif here.behind and rank:
            world = world.with_worker(index, at="receive", incoming=source.step)
        else:
            world = world.with_worker(index, at="compute")
    return world


def _reduce(world: World, seen: Seen, here: Join, peers: list[Worker]) -> World:
    if len({p.step for p in peers}) > 1:
        raise Violation(f"replicas of steps {[p.step for p in peers]} reduce together")
    if here.generation < seen.generation and any(m not in seen.dead for m in here.members):
        raise Violation(f"generation {here.generation} takes a step after {seen.generation} was formed")
    votes = any(p.pause for p in peers)
    if any(p.asked for p in peers) and not votes:
        raise Violation("a pause was asked for and forgotten")
    for index in here.members:
        world = world.with_worker(index, at="reduced", votes=votes)
    return world
