"""Data parallelism by hand, for `torchrun`, in its fastest form: DDP on gloo, one thread per process.

Both processes shuffle alike and take their halves of the global batch from memory. The fused
kernel of AdamW, gradients as views of DDP's buckets, no `.item()`. Prints one JSON object with the
milliseconds a step.
"""

import argparse
import json
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.bench.bare_loop import batches
from tests.bench.subjects import LEARNING_RATE, SUBJECTS, digits

_WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--seconds", type=float, default=3.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    subject = SUBJECTS[arguments.subject]
    model = DistributedDataParallel(subject.build(), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    objective = nn.CrossEntropyLoss()
    inputs, targets = digits()
    torch.manual_seed(0)
    feed = batches(inputs, targets, subject.batch, rank, world)

    def steps(count: int) -> float:
        """Seconds a step."""
        begin = time.perf_counter()
        for _ in range(count):
            x, y = next(feed)
            optimizer.zero_grad(set_to_none=True)
            loss = objective(model(x), y)
            loss.backward()
            optimizer.step()
        return (time.perf_counter() - begin) / count

    steps(_WARM_UP)
    # All processes must take the same number of steps, so one of them says how many.
    count = torch.tensor([max(_WARM_UP, int(arguments.seconds / steps(_WARM_UP)))])
    dist.broadcast(count, src=0)
    dist.barrier()
    took = steps(int(count))
    if rank == 0:
        print(json.dumps({"ms": 1000 * took}), flush=True)
    dist.barrier()
    # gloo's own end aborts now and then, when the other process was faster: it isn't measured.
    os._exit(0)


if __name__ == "__main__":
    main()
