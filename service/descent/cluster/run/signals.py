"""Ctrl-C, SIGTERM and SIGHUP while a run trains: a clean end at the step's end, or at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

from descent.cluster.run.console import print_line


class StopSignals:
    """While entered, Ctrl-C, SIGTERM and SIGHUP (a closed terminal) ask for an end at the step's end.

    A second Ctrl-C doesn't wait. A SIGHUP that the process was started to ignore (by `nohup`) stays
    ignored. Outside of the main thread Python can't handle signals, so nothing is changed there.
    """

    def __init__(self, stop: Callable[[], None], console: Console) -> None:
        """stop: asks the training to end at the current step's end; it must be safe in a signal handler."""
        self._stop, self._console = stop, console
        self._before: dict[int, Any] = {}
        self._requests = 0
        self.training = True
        """False once there is no step to stop after: the results are being recorded, which a signal doesn't cut."""

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            handled = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                handled.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._requests += 1
        if self._requests > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if self.training:
            self._stop()
            line = f"{name}: stopping at the end of this step, with a checkpoint (Ctrl-C again: at once)"
        else:
            line = f"{name}: the training is over, its results are being recorded (Ctrl-C again: end at once)"
        print_line(self._console, line)
