"""Faults on purpose, for tests and `descent chaos`: what each kind of `messages.Fault` does to this process.

`Control.enter` calls `strike` only while there are faults to inject. Each fault strikes once, when its
phase is first entered at its step or at a later one; so a fault is not missed where its message
arrives after the step.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from descent.messages import Fault
from descent.training.collectives import Group

_SIGNALS = {
    "kill": signal.SIGKILL,
    "segfault": signal.SIGSEGV,
    "stop": signal.SIGSTOP,
    "leave": signal.SIGTERM,
}
KINDS = (*_SIGNALS, "slow", "nan", "flip", "partition", "error")
PHASES = ("join", "receive", "step", "forward", "reduce", "update", "evaluate", "save")
_AFTER_COMMIT = ("evaluate", "save")


@dataclass
class Target:
    """What a fault can damage beside the process itself."""

    parameters: Sequence[nn.Parameter] = ()
    group: Group | None = None
    generation: int = 0


def strike(faults: list[Fault], phase: str, committed: int, target: Target) -> list[Fault]:
    """Inject the faults that are due in this phase and take them off the list.

    committed: the last committed step. Returns the faults that were injected, where the process survives them.
    """
    step = committed if phase in _AFTER_COMMIT else committed + 1
    due = [f for f in faults if f.phase == phase and step >= f.step]
    for fault in due:
        faults.remove(fault)
        if fault.kind == "slow" and fault.count > 1:
            faults.append(replace(fault, step=step + 1, count=fault.count - 1))
        _inject(fault, target)
    return due


def _inject(fault: Fault, target: Target) -> None:
    if fault.kind in _SIGNALS:
        _after(fault.delay_s, lambda: os.kill(os.getpid(), _SIGNALS[fault.kind]))
    elif fault.kind == "partition":
        group = target.group
        if group is not None:
            _after(fault.delay_s, group.abandon)
    else:  # these happen on the training thread
        time.sleep(fault.delay_s)
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "nan":
            _poison(target.parameters)
        elif fault.kind == "flip":
            _flip(target.parameters)
        elif fault.kind == "error":
            raise RuntimeError("injected error")
        else:
            raise AssertionError(f"no fault is called {fault.kind!r}; there are {', '.join(KINDS)}")


def _after(delay_s: float, act: Callable[[], None]) -> None:
    if not delay_s:
        act()
        return
    timer = threading.Timer(delay_s, act)
    timer.daemon = True
    timer.start()


def _poison(parameters: Sequence[nn.Parameter]) -> None:
    """Make one entry of the next gradient NaN, before the gradient is added up or sent."""
    trained = [p for p in parameters if p.requires_grad]

    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        spoiled = gradient.clone()
        spoiled.view(-1)[0] = float("nan")
        return spoiled

    # The last one: the output layer's, which every step uses.
    handle = trained[-1].register_hook(spoil)


@torch.no_grad()
def _flip(parameters: Sequence[nn.Parameter]) -> None:
    """Flip a bit of the mantissa in a parameter's first entry."""
    p = parameters[0]
    entry = p.detach()[(0,) * p.dim()].reshape(1).view(torch.uint8)
    entry[-2] ^= 1
