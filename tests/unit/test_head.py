"""Questions to a cluster's head that answers, is late, fails, or never answers; the clock is the real one."""

import threading

import pytest

from descent.cluster.workers import head
from descent.cluster.workers.head import Head


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_ANSWER_S", 0.05)
    monkeypatch.setattr(head, "_SILENT_S", 0.0)


def test_a_head_that_hangs_keeps_nobody_waiting_and_is_lost_until_it_answers() -> None:
    asked, hangs = Head(), threading.Event()
    assert asked.ask(lambda: 3, 0) == 3 and not asked.lost
    assert asked.ask(hangs.wait, None) is None
    assert asked.lost
    assert asked.ask(lambda: 4, 0) == 0, "the question before is still open"
    hangs.set()
    assert asked._open is not None and asked._open.over.wait(60)
    assert not asked.lost
    asked._open.over.wait(60)
    assert asked.ask(lambda: 5, 0) == 5


def test_an_error_is_no_answer() -> None:
    asked = Head()

    def fail() -> int:
        raise ConnectionError("refused")

    assert asked.ask(fail, 7) == 7 and asked.lost
    assert asked.ask(lambda: 8, 0) == 8 and not asked.lost
