"""What a batch is: any nesting of dicts, tuples, lists and dataclasses with tensors at the ends.

The samples lie in dimension 0 of the tensors, unless the collate function arranges them otherwise (packed
sequences, graphs). The functions here are all that the rest of Descent does with a batch of unknown form.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
"""Sample numbers, [n], each from 0 to the number of samples - 1."""
Pair = tuple[Tensor, Tensor]
"""Inputs [n, ...] and targets [n, ...] of a batch, or one input and one target."""
Batch = Any
"""A tree of tensors: what the data set, or the collate function, makes of some samples."""


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """The same tree with `function` applied to each tensor; whatever is no tensor and no container stays as it is.

    >>> map_tensors(lambda t: t + 1, {"a": torch.zeros(1), "b": (torch.ones(1), "text")})
    {'a': tensor([1.]), 'b': (tensor([2.]), 'text')}
    """
    return _map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def to_device(batch: Batch, device: torch.device, *, non_blocking: bool = True) -> Batch:
    """The batch on the device. An object of another class that has a method `to` (a graph) is asked to move itself."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device, non_blocking=non_blocking)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return _map(move, batch)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """A tree of the same classes, with `function` applied to all that is neither dict, list, tuple nor dataclass."""
    if isinstance(value, Tensor | PackedSequence):
        return function(value)
    if isinstance(value, Mapping):
        mapped = {key: _map(function, item) for key, item in value.items()}
        return mapped if type(value) is dict else _like(value, mapped)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_map(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _map(function, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return function(value)


def _like(original: Mapping[Any, Any], mapped: dict[Any, Any]) -> Any:
    """`mapped` in the class of `original`, such as a tokenizer's BatchEncoding; a plain dict where the class refuses."""
    try:
        return type(original)(mapped)  # type: ignore[call-arg]
    except TypeError:
        return mapped


def tensors_of(batch: Batch, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of each tensor, in the order of the tree; the path reads like Python: `['labels'][0].mask`."""
    if isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors_of(value, f"{path}[{key!r}]")
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        for name, value in zip(batch._fields, batch, strict=True):
            yield from tensors_of(value, f"{path}.{name}")
    elif isinstance(batch, tuple | list):
        for index, value in enumerate(batch):
            yield from tensors_of(value, f"{path}[{index}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for f in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, f.name), f"{path}.{f.name}")


def num_rows(batch: Batch) -> int | None:
    """The common length of dimension 0 of all tensors; None where the tensors differ in it, or are none."""
    sizes = {tensor.shape[0] if tensor.dim() else None for _, tensor in tensors_of(batch)}
    return sizes.pop() if len(sizes) == 1 else None


def rows(batch: Batch, first: int, stop: int) -> Batch:
    """The samples first … stop-1 of a batch whose tensors all have the samples in dimension 0 (see `num_rows`).

    Lists with one entry a sample, such as texts, are cut too.
    """
    length = num_rows(batch)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[first:stop]
        if isinstance(value, list) and len(value) == length and not any(True for _ in tensors_of(value)):
            return value[first:stop]
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        if type(value) in (tuple, list):
            return type(value)(cut(item) for item in value)
        return map_tensors(lambda tensor: tensor[first:stop], value)

    return cut(batch)


def describe(batch: Batch, depth: int = 3) -> str:
    """A batch in words for a message: its structure, with the type and shape of each tensor.

    >>> describe({"ids": torch.zeros(2, 3, dtype=torch.int64), "mask": [torch.ones(2)]})
    "{'ids': int64 [2, 3], 'mask': [float32 [2]]}"
    """
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {list(batch.shape)}"
    if depth == 0:
        return type(batch).__name__
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(value, depth - 1)}" for key, value in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        inner = ", ".join(describe(value, depth - 1) for value in batch[:8]) + (" …" if len(batch) > 8 else "")
        return f"[{inner}]" if isinstance(batch, list) else f"({inner})"
    return type(batch).__name__
