"""Safetensors files in memory: where each tensor's bytes lie, for writing and for reading without a copy.

The format (github.com/huggingface/safetensors, README): eight bytes with the header's length,
little-endian; the header, JSON: name -> dtype, shape, [begin, end) within the data; the data.
The library builds a file from byte strings, that is from one more copy of all tensors, and holds
the interpreter's lock while it does; to read a file that came over the network, it copies twice.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}


@dataclass(frozen=True)
class Layout:
    """Where each tensor's bytes lie in the file."""

    header: bytes
    spans: dict[str, tuple[int, int]]
    """Name -> [begin, end) from the file's first byte."""
    size: int


def layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Layout:
    """The layout of a file with these tensors. Raises ValueError for a dtype that the format doesn't have."""
    # As the library does: tensors with the largest items first, so that each begins at a multiple of its item size.
    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    spans, at = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name}: safetensors files can't hold {tensor.dtype}")
        stop = at + math.prod(tensor.shape) * tensor.element_size()
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
        spans[name] = (at, stop)
        at = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {n: (a + len(header), b + len(header)) for n, (a, b) in spans.items()}, at + len(header))


def tensors_in(content: bytearray) -> dict[str, Tensor]:
    """The tensors of a whole file in memory; they use that memory, so nothing is copied.

    The content must have been verified. Raises ValueError if it is no safetensors file.
    """
    size = int.from_bytes(content[:8], "little")
    if not 2 <= size <= len(content) - 8:
        raise ValueError("the header's length is not within the file")
    header = json.loads(content[8 : 8 + size].decode())
    dtypes = {name: dtype for dtype, name in _NAMES.items()}
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = dtypes[entry["dtype"]], entry["shape"]
        start, stop = (offset + 8 + size for offset in entry["data_offsets"])
        count = math.prod(shape)
        if (
            min(shape, default=0) < 0
            or start < 8 + size
            or stop > len(content)
            or stop - start != count * dtype.itemsize
        ):
            raise ValueError(f"{name}: lies outside of the file")
        flat = (
            torch.frombuffer(content, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
        )
        found[name] = flat.view(shape)
    return found
