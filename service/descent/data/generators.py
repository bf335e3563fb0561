"""The three global random generators that Python code draws from: Python's, NumPy's and torch's."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_generators(seed: int) -> None:
    """Seed all three generators; of torch's, the one of the CPU only."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def own_generators(seed: int | None = None) -> Iterator[Callable[[], set[str]]]:
    """Within the block, draws don't count: the generators' states are put back at its end.

    seed: what the generators are seeded with first; None leaves their states as they are.
    Yields a function that returns which of "python", "numpy" and "torch" the block has drawn from.
    """
    before = _states()
    if seed is not None:
        seed_generators(seed)
    begun = before if seed is None else _states()

    def drew() -> set[str]:
        return {name for name, state in _states().items() if state != begun[name]}

    try:
        yield drew
    finally:
        random.setstate(before["python"])
        kind, keys, *rest = before["numpy"]
        np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(torch.frombuffer(bytearray(before["torch"]), dtype=torch.uint8))


@contextmanager
def python_and_numpy_seeded(seed: int) -> Iterator[None]:
    """Within the block, Python's and NumPy's generators begin with `seed`; torch's goes on as it is.

    Their states are put back at the end, because libraries make names by Python's generator.
    """
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _states() -> dict[str, Any]:
    numpys: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpys[0], numpys[1].tobytes(), *numpys[2:]),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
