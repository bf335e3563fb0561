"""What earlier generations leave behind in a process: nothing that keeps it from the next one, or busy."""

import random
import time

import psutil
import torch.distributed as dist

from service.messages import Membership
from service.training.dealing import deal_slots
from tests.distributed.conductor import assert_survives
from tests.distributed.replicas import Case, Crew, Told, cut


def test_who_could_not_connect_once_or_twice_joins_members_who_never_tried(
    pool: Crew, case: Case, undisturbed: Told
) -> None:
    unlucky, *others = replicas = pool.build(case, 3)
    for _ in range(2):
        pool.generation += 1
        # Rank 1 says that it is there, and is gone before it connects.
        client = dist.TCPStore(
            pool.store.host, pool.store.port, None, False, wait_for_workers=False
        )
        dist.PrefixStore(f"generation/{pool.generation}", client).set("here/1", "1")
        membership = Membership(
            pool.generation, 0, 2, pool.store.host, pool.store.port,
            deal_slots(case.plan.slots, 2), case.plan.micro_size, (),
        )  # fmt: skip
        unlucky.send("join", (membership, False))
        told = unlucky.hear()
        assert (told.state, told.step) == ("broken", 0), told.error
    pool.form(case, [others[0], unlucky, others[1]])
    for told in (replica.hear() for replica in replicas):
        assert (told.state, told.sha256) == ("finished", undisturbed.sha256), told.error
    pool.give(replicas)


def test_no_connection_of_a_generation_that_broke_is_left_half_open(
    pool: Crew, case: Case, undisturbed: Told
) -> None:
    """gloo's thread never reads some of them again, and would spin on each until the run's end."""
    rng = random.Random(3)
    faults = [
        cut(w).at(rng.randrange(1, 20), rng.choice(["forward", "reduce", "update"]), rng.random() * 0.003)
        for w in (0, 1, 2) for _ in range(6)
    ]  # fmt: skip
    conductor = assert_survives(pool, case, undisturbed, 3, *faults)
    assert len(conductor.formed) > 6
    left: list[psutil._common.pconn] = []
    for _ in range(100):
        left = [
            c for replica in conductor.replicas.values()
            for c in psutil.Process(replica.process.pid).net_connections("tcp")
            if c.status in (psutil.CONN_CLOSE_WAIT, psutil.CONN_CLOSE, psutil.CONN_FIN_WAIT2)
        ]  # fmt: skip
        if not left:
            break
        time.sleep(0.1)
    assert not left
