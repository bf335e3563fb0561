"""On a GPU where there is one; else, under a torch without CUDA, on the stand-in."""

import pytest

from tests.gpu.stand_in import stand_in

STANDING_IN = stand_in()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch  # after the stand-in

    for item in items:
        if STANDING_IN and item.get_closest_marker("real_gpu"):
            item.add_marker(pytest.mark.skip(reason="only a GPU can show this"))
        elif not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="this torch wants a GPU, and there is none"))
