"""How long a save of 300 MB holds the training up, and what it takes from the steps that it runs beside.

One loop, an MLP of 25 million parameters with AdamW on one thread, in three processes that take
turns: Descent's `ShareWriter` as the trainer uses it (copied behind the next step's gradients, written
by threads), blocking `torch.save`, and `torch.distributed.checkpoint.async_save`. The stall is the
time in the call, and for Descent also the time that the next update waits for the copy.
`checkpoint_throughput` compares the steps during Descent's saves with those without one.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tests.bench.measure import PAIRS, Result, output_of, result_of, rounded, worst

TARGETS = {"checkpoint_stall_torch_save": 0.12, "checkpoint_stall_async_save": 1.0}
_THROUGHPUT = 0.97
_SAVES = 3


def run() -> list[Result]:
    """The stall against both, the throughput, and the worst as `checkpoint_stall`."""
    told: dict[str, list[dict[str, float]]] = {"descent": [], "torch_save": [], "async_save": []}
    for _ in range(PAIRS):
        for kind, found in told.items():
            with tempfile.TemporaryDirectory() as folder:
                found.append(output_of(["-m", "tests.bench.checkpoint_stall", kind], Path(folder)))
    results = []
    for kind in ("torch_save", "async_save"):
        name = f"checkpoint_stall_{kind}"
        pairs = [(o["stall_ms"], t["stall_ms"]) for o, t in zip(told["descent"], told[kind], strict=True)]
        results.append(result_of(name, pairs, TARGETS[name], "lower", unit="ms of stall"))
    pairs = [(o["during_per_s"], o["without_per_s"]) for o in told["descent"]]
    beside = {
        kind: rounded(statistics.median(t["during_per_s"] / t["without_per_s"] for t in told[kind]))
        for kind in ("async_save",)
    }
    throughput = result_of("checkpoint_throughput", pairs, _THROUGHPUT, "higher", unit="steps/s", **beside)
    return [*results, throughput, worst("checkpoint_stall", results)]


# -- one process ----------------------------------------------------------------------


class Loop:
    """The training that is held up."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 1024)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x = torch.randn(32, 1024)
        self.waited_s = 0.0
        """How long the update after a save waited for its copy."""

    def step(self) -> float:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        (self.model(self.x) - self.x).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - begin

    def state(self) -> dict[str, torch.Tensor]:
        found = {f"model/{n}": p.detach() for n, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer/{name}/{key}"] = value
        return found


def main(kind: str) -> dict[str, float]:
    """Stall per save, and steps a second during saves and without."""
    loop = Loop()
    save, saving = {"descent": _descent, "torch_save": _torch_save, "async_save": _async_save}[kind](loop)
    for _ in range(3):
        loop.step()
    save(0)  # buffers, imports, the disk's first blocks
    while saving():
        loop.step()
    stalls, during, without = [], [], []
    for number in range(1, _SAVES + 1):
        if kind == "descent" or number == 1:
            without += [loop.step() for _ in range(8)]
        begin = time.perf_counter()
        save(number)
        called = time.perf_counter() - begin
        while saving():
            during.append(loop.step())
        stalls.append(called + loop.waited_s)
    return {
        "stall_ms": 1000 * statistics.median(stalls),
        "during_per_s": len(during) / sum(during) if during else 1 / statistics.mean(without),
        "without_per_s": len(without) / sum(without),
        "steps_during": len(during),
    }


Save = tuple[Callable[[int], None], Callable[[], bool]]


def _descent(loop: Loop) -> Save:
    from descent.checkpoint.writer import ShareWriter
    from descent.messages import ShareWritten

    parts: list[ShareWritten] = []
    writer = ShareWriter(Path("checkpoints").resolve(), parts.append)
    loop.optimizer.register_step_pre_hook(lambda *_: writer.wait_for_copy())
    begun = 0

    def save(step: int) -> None:
        nonlocal begun
        begun += 1
        begin = time.perf_counter()
        writer.write(loop.state(), step=step, rank=0, world_size=1, generation=1, scalars={})
        loop.waited_s = -(time.perf_counter() - begin)  # the part's figure has this in it too

    def saving() -> bool:
        if len(parts) < begun:
            return True
        assert parts[-1].error is None, parts[-1].error
        loop.waited_s += parts[-1].stalled_s
        return False

    return save, saving


def _torch_save(loop: Loop) -> Save:
    def save(step: int) -> None:
        torch.save(loop.state(), f"state-{step % 2}.pt")

    return save, lambda: False


def _async_save(loop: Loop) -> Save:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    under_way: list[object] = []

    def save(step: int) -> None:
        under_way[:] = [dcp.async_save(loop.state(), checkpoint_id=f"dcp-{step}")]

    return save, lambda: bool(under_way) and not under_way[0].done()  # type: ignore[attr-defined]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("descent", "torch_save", "async_save"))
    print(json.dumps(main(parser.parse_args().kind)), flush=True)
    sys.exit(0)
