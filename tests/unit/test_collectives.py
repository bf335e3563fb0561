"""Waiting for a collective in slices: what ends between two looks isn't a lost peer."""

import threading

import pytest
import torch

from descent.training.collectives import Group, PeerLost, in_short

SLICE_OVER = RuntimeError("Operation timed out!")


class Work:
    """A collective of torch's: each wait ends as given, None being success."""

    def __init__(self, *outcomes: RuntimeError | None, completed: bool) -> None:
        self._outcomes, self._completed = list(outcomes), completed

    def wait(self, _: object = None) -> None:
        outcome = self._outcomes.pop(0)
        if outcome is not None:
            raise outcome

    def is_completed(self) -> bool:
        return self._completed

    @property
    def all_heard(self) -> bool:
        return not self._outcomes


@pytest.fixture
def group() -> Group:
    return Group(0, 2, torch.device("cpu"), threading.Event())


@pytest.mark.parametrize("completed", [True, False])
def test_what_is_done_just_after_a_slice_is_over_is_a_success(group: Group, completed: bool) -> None:
    work = Work(SLICE_OVER, None, completed=completed)
    group.wait(work)
    assert work.all_heard


def test_what_failed_is_a_lost_peer_in_its_own_words(group: Group) -> None:
    failed = RuntimeError(
        "[/build/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:4494. This is typically caused by a crash."
    )
    with pytest.raises(PeerLost) as lost:
        group.wait(Work(failed, completed=True))
    assert str(lost.value) == in_short(failed) == "Connection closed by peer [127.0.0.1]:4494."


def test_its_own_time_out_is_a_lost_peer(group: Group) -> None:
    over = RuntimeError("Timed out waiting 600000ms for recv operation to complete")
    with pytest.raises(PeerLost, match="Timed out waiting 600000ms"):
        group.wait(Work(SLICE_OVER, over, over, completed=True))


def test_an_abort_ends_the_wait(group: Group) -> None:
    group._abort.set()
    with pytest.raises(PeerLost, match="aborted"):
        group.wait(Work(SLICE_OVER, completed=False))
