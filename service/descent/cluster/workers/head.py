"""Questions to the cluster's head (Ray's GCS), which a controller that must not stand still can ask.

A head that is gone, or hangs, keeps whoever asks it waiting for a minute; then Ray ends the process that
asked, without a word. So questions are asked on a thread of their own, and the answer is waited for shortly.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

_ANSWER_S = 2.0
"""How long an answer is waited for. Usually it takes milliseconds."""
_SILENT_S = 5.0
"""A head that has left a question unanswered for so long counts as lost."""

T = TypeVar("T")


@dataclass
class _Question:
    asked: Callable[[], Any]
    answer: Any = None
    error: BaseException | None = None
    over: threading.Event = field(default_factory=threading.Event)


class Head:
    """Asks one question at a time."""

    def __init__(self) -> None:
        self._questions: queue.SimpleQueue[_Question] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._open: _Question | None = None
        self._silent_since: float | None = None
        """Monotonic time of the first question in a row that was not answered; None while all are."""

    def ask(self, question: Callable[[], T], otherwise: T) -> T:
        """The answer; `otherwise` where it doesn't come in time, or an earlier question is still open."""
        if self._open is not None and not self._open.over.is_set():
            return otherwise
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ask-head", daemon=True)
            self._thread.start()
        asked_at = time.monotonic()
        self._open = _Question(question)
        self._questions.put(self._open)
        if self._open.over.wait(_ANSWER_S) and self._open.error is None:
            self._silent_since = None
            answer: T = self._open.answer
            return answer
        if self._silent_since is None:
            self._silent_since = asked_at
        return otherwise

    def _work(self) -> None:
        while True:
            question = self._questions.get()
            try:
                question.answer = question.asked()
            except Exception as error:  # Ray raises whatever occurs to it
                question.error = error
            question.over.set()

    @property
    def lost(self) -> bool:
        """Whether the head has not answered for some seconds. Only a new question shows that it is back."""
        if self._open is not None and self._open.over.is_set() and self._open.error is None:
            self._silent_since = None  # the answer came late
        return self._silent_since is not None and time.monotonic() - self._silent_since > _SILENT_S
