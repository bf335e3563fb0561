"""A member whose generation could not be connected, because a peer died just then, joins the next one."""

import torch.distributed as dist

from service.messages import Membership
from service.training.dealing import deal_slots
from tests.distributed.replicas import Case, Crew, Told


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
