"""What earlier generations leave behind in a process: nothing that keeps it from the next one, or busy."""

import random
import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from descent.messages import Membership
from descent.training.slot_balancer import assign_slots
from tests.distributed.led import LedRun
from tests.distributed.replicas import Case, Crew, Replica, Report, cut


def test_who_could_not_connect_once_or_twice_joins_members_who_never_tried(
    pool: Crew, case: Case, undisturbed: Report
) -> None:
    unlucky, *others = replicas = pool.build(case, 3)
    for _ in range(2):
        pool.generation += 1
        # Rank 1 says that it is there, and is gone before it connects.
        client = dist.TCPStore(pool.store.host, pool.store.port, None, False, wait_for_workers=False)
        dist.PrefixStore(f"generation/{pool.generation}", client).set("here/1", "1")
        membership = Membership(
            pool.generation,
            0,
            2,
            pool.store.host,
            pool.store.port,
            assign_slots(case.plan.slots, 2),
            case.plan.micro_size,
            (),
        )
        unlucky.send("join", (membership, False))
        reports = unlucky.next_report()
        assert (reports.state, reports.step) == ("broken", 0), reports.error
    pool.form(case, [others[0], unlucky, others[1]])
    for reports in (replica.next_report() for replica in replicas):
        assert (reports.state, reports.sha256) == ("finished", undisturbed.sha256), reports.error
    pool.give(replicas)


def test_no_thread_of_a_generation_that_broke_goes_on_computing(pool: Crew, case: Case, undisturbed: Report) -> None:
    """gloo's would spin on a connection with a message that nobody waits for any more."""
    rng = random.Random(3)
    faults = [
        cut(w).at(rng.randrange(1, 20), rng.choice(["forward", "reduce"]), rng.choice([0.0, rng.random() * 0.003]))
        for w in (0, 1, 2)
        for _ in range(8)
    ]
    run = LedRun(pool, case)
    run.start(3, *faults)
    spinning: list[dict[str, float]] = []

    def look() -> None:
        """Between two generations, when all members have left the one that broke."""
        before = {w: _computed_s(replica) for w, replica in run.group.replicas.items()}
        time.sleep(0.5)
        spinning.append({w: _computed_s(replica) - before[w] for w, replica in run.group.replicas.items()})

    run.group.before_join = look
    outcome = run.finish()
    # They look about them a hundred times a second, which takes some milliseconds.
    assert all(computed < 0.1 for found in spinning for computed in found.values()), spinning
    assert len(run.formed) > 6 and len(spinning) == len(run.formed)
    assert outcome.state_sha256 == undisturbed.sha256


def _computed_s(replica: Replica) -> float:
    """CPU time of gloo's threads."""
    total = 0.0
    for thread in Path(f"/proc/{replica.process.pid}/task").iterdir():
        with suppress(OSError):  # it has just ended
            if (thread / "comm").read_text().startswith("gloo"):
                total += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return total
