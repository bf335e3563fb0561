"""Signals while a run trains and while its results are recorded; the test's own process gets them."""

import io
import os
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from descent.cluster.run.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_for_a_stop_and_the_second_ctrl_c_does_not_wait(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stops: list[str] = []
    out = io.StringIO()
    with StopSignals(lambda: stops.append("stop"), Console(file=out, width=200)):
        os.kill(os.getpid(), number)
        assert stops == ["stop"] and f"{number.name}: stopping at the end of this step" in out.getvalue()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {n: signal.getsignal(n) for n in before} == before


def test_while_results_are_recorded_a_signal_cuts_nothing() -> None:
    out = io.StringIO()
    with StopSignals(lambda: pytest.fail("there is no step to stop after"), Console(file=out, width=200)) as signals:
        signals.training = False
        os.kill(os.getpid(), signal.SIGHUP)
    assert "its results are being recorded" in out.getvalue()


NOHUP = """
import io, os, signal
from rich.console import Console
from descent.cluster.run.signals import StopSignals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
stops = []
with StopSignals(lambda: stops.append(1), Console(file=io.StringIO())):
    os.kill(os.getpid(), signal.SIGHUP)
print(stops)
"""


def test_what_nohup_ignores_stays_ignored() -> None:
    done = subprocess.run([sys.executable, "-c", NOHUP], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
