"""The sentinel's hashes: any flipped bit shows, equal bits never differ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from descent.training.sentinel import hash_on_device, hash_on_host, minority_of

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
HASHES = [hash_on_host, lambda tensors: int(hash_on_device(tensors))]


def tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 1500), (), (0, 4), (7,), (2049,), (64, 33)]
    return [
        (torch.randn(shape, generator=generator) * 50).to(dtype) for shape, dtype in zip(shapes, DTYPES, strict=False)
    ] + [torch.randn(5, generator=generator) > 0, torch.randn(3, 2, generator=generator).T]


@pytest.mark.parametrize("digest", HASHES)
@given(st.integers(0, 2**31), st.data())
def test_any_flipped_bit_shows(digest, seed: int, data: st.DataObject) -> None:
    before = tensors(seed)
    after = [t.clone() for t in before]
    assert digest(before) == digest(after)
    flat = data.draw(st.sampled_from([t for t in after if t.numel() and t.dtype != torch.bool]))
    raw = flat.view(torch.uint8) if flat.dim() and flat.is_contiguous() else flat.reshape(1, -1).view(torch.uint8)
    at = data.draw(st.integers(0, raw.numel() - 1))
    raw.view(-1)[at] ^= 1 << data.draw(st.integers(0, 7))
    changed = [*after]
    if not any(t.data_ptr() == raw.data_ptr() for t in after):  # a copy: put it in its place
        index = next(i for i, t in enumerate(after) if t is flat)
        changed[index] = raw.view(flat.dtype).view(flat.shape)
    assert digest(changed) != digest(before)


@pytest.mark.parametrize("digest", HASHES)
def test_places_count(digest) -> None:
    a, b = torch.randn(4000), torch.randn(4000)
    assert digest([a, b]) != digest([b, a])
    assert digest([a]) != digest([a.roll(1024)])


def test_nothing_on_a_device_has_no_hash() -> None:
    assert hash_on_device([]) is None and hash_on_device([torch.empty(0)]) is None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_the_minority_is_those_that_differ_from_the_most_frequent(values: list[int]) -> None:
    odd = minority_of([(v, 0, 0) for v in values])
    counts = sorted((values.count(v) for v in set(values)), reverse=True)
    if len(counts) == 1:
        assert odd == ()
    elif counts[0] == counts[1]:
        assert odd == tuple(range(len(values)))
    else:
        usual = max(set(values), key=values.count)
        assert odd == tuple(i for i, v in enumerate(values) if v != usual)
