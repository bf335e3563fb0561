"""The feed on a GPU: a set that lies there, and one that is read ahead and moved."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from descent.data.base import TensorData
from descent.data.map_style import MapStyle
from descent.data.splits import hold_out
from descent.training.input.feed import Feed
from descent.training.input.sampling import SampleOrder
from tests.unit.test_feed import Numbers, run

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("resident", [True, False])
def test_batches_arrive_on_the_device_as_they_are_on_the_host(resident):
    x = torch.arange(500.0)[:, None]
    stored = TensorData(x, -torch.arange(500), num_outputs=1, name="n", source="here")
    train, _ = hold_out(stored if resident else MapStyle(Numbers(500)), 0.2, 0)
    order = SampleOrder.of(train, 40, 1)
    feed = Feed(train, order, CUDA)
    assert (feed._resident is not None) == resident
    for step, (inputs, targets) in enumerate(run(feed, order, range(1, 30), 2, 7), start=1):
        expected = train.parent_indices(order.samples_of(step))
        assert inputs == expected.tolist()
        assert targets == (-expected).tolist()
    assert feed.take(np.arange(3))[0].device == CUDA


class Copies(TorchDispatchMode):
    """Whether what is copied from the host to the device lies in pinned memory, copy by copy."""

    def __init__(self):
        super().__init__()
        self.pinned = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to = (kwargs or {}).get("device")
        if func._overloadpacket is torch.ops.aten._to_copy and to is not None and to.type == "cuda":
            self.pinned.append(args[0].is_pinned())
        return func(*args, **(kwargs or {}))


def test_what_is_read_ahead_goes_to_the_device_from_pinned_memory():
    order = SampleOrder.of(stored := MapStyle(Numbers(500)), 40, 1)
    feed = Feed(stored, order, CUDA)
    with Copies() as copies:
        read = feed._read_ahead(order.samples_of(3), 3)
    assert copies.pinned == [True, True]
    inputs, targets = read.to(CUDA)
    assert inputs.is_cuda and targets.is_cuda
    assert inputs[:, 0].tolist() == order.samples_of(3).tolist()
