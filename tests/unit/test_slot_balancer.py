"""Slots by speed: the best assignment, and when it is worth a change."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from descent.training.slot_balancer import SlotBalancer, assign_by_speed, assign_slots, slowest_time

speeds = st.lists(st.floats(1e-6, 10.0), min_size=1, max_size=4)


@given(speeds, st.integers(0, 5))
def test_no_assignment_is_faster(seconds: list[float], extra: int) -> None:
    slots = len(seconds) + extra
    shares = assign_by_speed(slots, seconds)
    assert [s for lo, hi in shares for s in range(lo, hi)] == list(range(slots))
    assert all(hi > lo for lo, hi in shares)
    best = min(
        max(n * s for n, s in zip(counts, seconds, strict=True))
        for counts in itertools.product(range(1, slots + 1), repeat=len(seconds))
        if sum(counts) == slots
    )
    assert slowest_time(shares, seconds) == pytest.approx(best)


@given(st.integers(1, 30), st.integers(1, 30))
def test_equal_speeds_get_even_shares(slots: int, world: int) -> None:
    world = min(slots, world)
    sizes = [hi - lo for lo, hi in assign_by_speed(slots, [0.5] * world)]
    assert sorted(sizes) == sorted(hi - lo for lo, hi in assign_slots(slots, world))


def balancer(slots: int, world: int, may_move: bool = True, after_s: float = 30.0) -> SlotBalancer:
    return SlotBalancer(assign_slots(slots, world), slots, may_move, 1.5, after_s)


def observed(balancer: SlotBalancer, steps: int, seconds: list[float], start: float = 0.0) -> list[object]:
    """What each step's observation gives; a step takes a second."""
    return [balancer.observe(seconds, start + s) for s in range(steps)]


def test_a_rank_at_half_speed_soon_has_half_the_slots() -> None:
    d = balancer(12, 3)
    moved = [x for x in observed(d, 20, [1.0, 2.0, 1.0]) if x is not None]
    assert moved == [((0, 5), (5, 7), (7, 12))] and d.shares == moved[0]
    # and gets them back
    moved = [x for x in observed(d, 20, [1.0, 1.0, 1.0]) if x is not None]
    assert moved == [assign_slots(12, 3)]


def test_nothing_moves_where_it_is_off_or_there_are_no_slots_to_spare() -> None:
    for d in (balancer(12, 3, may_move=False), balancer(3, 3)):
        assert not any(observed(d, 30, [1.0, 5.0, 1.0]))
        assert d.ratio == 5.0


def test_ranks_that_take_turns_at_being_slow_do_not_pass_slots_to_and_fro() -> None:
    d = balancer(4, 2)
    moves = 0
    for look in range(400):
        seconds = [1.0, 3.0] if look % 2 else [3.0, 1.0]
        moves += sum(shares is not None for shares in observed(d, 5, seconds, 5.0 * look))
    assert moves <= 2


def test_speeds_that_change_now_and_then_are_followed_ever_more_slowly() -> None:
    d = balancer(4, 2)
    moves = 0
    for look in range(400):
        seconds = [1.0, 3.0] if look // 10 % 2 else [3.0, 1.0]
        moves += sum(shares is not None for shares in observed(d, 5, seconds, 5.0 * look))
    assert 2 <= moves <= 6


@given(st.integers(0, 2**31))
def test_noise_moves_nothing(seed: int) -> None:
    import random

    rng, d = random.Random(seed), balancer(8, 4)
    for step in range(60):
        seconds = [1.0 + rng.uniform(-0.2, 0.2) for _ in range(4)]
        seconds[rng.randrange(4)] *= 50.0 if step % 7 == 0 else 1.0  # a hiccup now and then
        assert d.observe(seconds, float(step)) is None


def test_a_lasting_straggler_is_named_once() -> None:
    d = balancer(3, 3, after_s=30.0)
    named = []
    for step in range(100):
        slow = 3.0 if step < 20 or step > 40 else 1.0  # the first time not long enough
        d.observe([1.0, 1.0, slow], float(step))
        if d.straggler is not None:
            named.append((step, d.straggler))
    ((step, rank),) = named
    assert rank == 2 and 70 <= step <= 80


def test_of_two_ranks_the_faster_is_the_measure() -> None:
    d = balancer(2, 2, after_s=5.0)
    observed(d, 30, [1.0, 4.0])
    assert d.ratio == 4.0


def test_a_rank_that_has_not_measured_yet_is_waited_for() -> None:
    d = balancer(4, 2)
    assert not any(observed(d, 50, [1.0, 0.0])) and d.ratio == 0.0
