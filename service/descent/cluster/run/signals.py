"""Ctrl-C and SIGTERM while a run trains: a clean end at the step's end, or at once."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console


@contextmanager
def stopping(stop: Callable[[], None], console: Console) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask for an end at the step's end; a second Ctrl-C doesn't wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = 0

    def ask(number: int, _: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        console.print(
            f"{signal.Signals(number).name}: stopping at the end of this step, with a checkpoint (again: at once)",
            highlight=False,
        )
        stop()

    before: Mapping[int, Any] = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
