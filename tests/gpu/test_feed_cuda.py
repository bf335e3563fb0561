"""The feed on a GPU: a set that lies there, and one that is read ahead and moved. Run by hand: python -m pytest tests/gpu."""

import numpy as np
import pytest
import torch

from service.data.base import TensorData
from service.data.map_style import MapStyle
from service.data.splits import hold_out
from service.training.feed import Feed
from service.training.sampling import SampleOrder
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
        expected = train.numbers(order.samples_of(step))
        assert inputs == expected.tolist()
        assert targets == (-expected).tolist()
    assert feed.take(np.arange(3))[0].device == CUDA
