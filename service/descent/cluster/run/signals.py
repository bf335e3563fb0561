"""Ctrl-C, SIGTERM and SIGHUP while a run trains: a clean end at the step's end, or at once."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console

from descent.cluster.run.console import print_line


@contextmanager
def stopping(stop: Callable[[], None], console: Console) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP (a closed terminal) ask for an end at the step's end; a second Ctrl-C doesn't wait.

    A SIGHUP that the process was started to ignore (by `nohup`) stays ignored. Outside of the main thread
    Python can't handle signals, so nothing is changed there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requests = 0

    def request_stop(number: int, _: FrameType | None) -> None:
        nonlocal requests
        requests += 1
        if requests > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop()
        print_line(
            console,
            f"{signal.Signals(number).name}: stopping at the end of this step, with a checkpoint (Ctrl-C again: at once)",
        )

    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        handled.append(signal.SIGHUP)
    before: Mapping[int, Any] = {number: signal.signal(number, request_stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
