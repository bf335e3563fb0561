"""The loop by hand: what a good PyTorch user writes for one process, and nothing more.

Data in memory, indexed by a new permutation in every epoch (no DataLoader, which would
only be slower), AdamW, one thread, gradients set to None. Two variants take turns:

fastest  the fused kernel of AdamW, and no look at the loss
plain    AdamW as torch gives it, and `loss.item()` in every step, as people do for a progress line

Prints one JSON object: milliseconds a step and CPU milliseconds a step for each variant,
and the process's peak resident set.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.bench.subjects import LEARNING_RATE, SUBJECTS, Subject, digits

_BLOCK_S = 0.5


def batches(
    inputs: Tensor, targets: Tensor, size: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of shuffled batches without end; what is left at an epoch's end is dropped."""
    while True:
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs) - size + 1, size):
            at = order[start : start + size][rank::world]
            yield inputs[at], targets[at]


def own_batches(subject: Subject) -> Iterator[dict[str, Tensor]]:
    """Shuffled batches of one of the user's own trainings, each a dict of tensors."""
    from tests.bench import own_programs

    data = getattr(own_programs, subject.own)()
    while True:
        order = torch.randperm(len(data))
        for start in range(0, len(data) - subject.batch + 1, subject.batch):
            at = order[start : start + subject.batch]
            yield {name: column[at] for name, column in data.columns.items()}


class Loop:
    """One variant with a model and an optimizer of its own."""

    def __init__(self, subject: Subject, variant: str, data: tuple[Tensor, Tensor]) -> None:
        self.model = subject.build()
        fastest = variant == "fastest"
        fused = True if fastest else None  # None: torch's default
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=fused)
        self.loss = nn.CrossEntropyLoss()
        self.look = not fastest
        self.batches = own_batches(subject) if subject.own else batches(*data, subject.batch)
        if subject.own:
            from tests.bench import own_programs

            self.own_loss = getattr(own_programs, f"loss_of_{subject.own}")
        self.own = bool(subject.own)
        self.steps, self.wall_s, self.cpu_s = 0, 0.0, 0.0

    def step(self) -> None:
        batch = next(self.batches)
        self.optimizer.zero_grad(set_to_none=True)
        if self.own:
            loss = self.own_loss(self.model, batch)
        else:
            inputs, targets = batch
            loss = self.loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        if self.look:
            loss.item()

    def run(self, seconds: float, counts: bool = True) -> None:
        begin, cpu, steps = time.perf_counter(), time.thread_time(), 0
        while (now := time.perf_counter()) - begin < seconds:
            self.step()
            steps += 1
        if counts:
            self.wall_s += now - begin
            self.cpu_s += time.thread_time() - cpu
            self.steps += steps


def peak_rss_mb() -> float:
    """VmHWM: getrusage's maximum would count what the parent held before exec."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each variant")
    parser.add_argument("--variants", default="fastest")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subject, data = SUBJECTS[arguments.subject], digits()
    loops = {v: Loop(subject, v, data) for v in arguments.variants.split(",")}
    for loop in loops.values():
        loop.run(_BLOCK_S, counts=False)
    for _ in range(max(1, round(arguments.seconds / _BLOCK_S))):
        for loop in loops.values():
            loop.run(_BLOCK_S)
    found = {
        v: {"ms": 1e3 * loop.wall_s / loop.steps, "cpu_ms": 1e3 * loop.cpu_s / loop.steps} for v, loop in loops.items()
    }
    first = next(iter(loops.values()))
    parameters = sum(p.numel() for p in first.model.parameters())
    print(json.dumps({**found, "parameters": parameters, "peak_rss_mb": peak_rss_mb()}))


if __name__ == "__main__":
    main()
