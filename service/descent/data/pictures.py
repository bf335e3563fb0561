"""Decoding images, in this process or in others; imports nothing heavy, so that those start at once.

`python -m descent.data.pictures` is a decoding process: it reads one JSON request a line,
writes pixels into a shared file, and answers each request with a line. It ends when its
input does, so none outlives the process that started it.
"""

import gc
import json
import mmap
import os
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]
Item = tuple[str, int, int]
"""(file, first byte, number of bytes; 0 for all)"""
_OPEN_FILES = 128
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Form:
    """What every image becomes: [channels, height, width] of bytes.

    resize: whether one of another size is scaled; else it is a bad record.
    """

    channels: int
    height: int
    width: int
    resize: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


class Files:
    """Bytes of files, the last ones used kept open: a tar shard holds thousands of images."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, item: Item) -> bytes:
        """Raises OSError."""
        file, first, size = item
        if size == 0:
            return _whole(file)
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return os.pread(self._open[file], size, first)


def _whole(file: str) -> bytes:
    """A file's bytes by three system calls: for a small image, `open` costs as much as its decoding."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def decode(content: bytes, form: Form) -> Pixels:
    """[channels, height, width]. Raises ValueError, in words for the user, for what isn't such an image."""
    mode = _MODES[form.channels]
    try:
        pixels: Image.Image = Image.open(BytesIO(content))
        if form.resize:
            # JPEG only: decoded at a fraction of its size, which is faster by its square
            pixels.draft(mode, (form.width, form.height))
        pixels.load()
        if pixels.mode != mode:  # to the same mode it would copy
            pixels = pixels.convert(mode)
    except UnidentifiedImageError as error:
        raise ValueError(f"is not an image ({len(content)} bytes)") from error
    except Exception as error:  # PIL's decoders raise a dozen kinds
        raise ValueError(f"can't be decoded: {' '.join(str(error).split())}") from error
    if pixels.size != (form.width, form.height):
        if not form.resize:
            raise ValueError(
                f"has {pixels.height}×{pixels.width} pixels, not {form.height}×{form.width}; "
                "set data.size to scale all images"
            )
        pixels = pixels.resize((form.width, form.height), Image.Resampling.BILINEAR)
    array = np.asarray(pixels, dtype=np.uint8)
    return array[None] if form.channels == 1 else array.transpose(2, 0, 1)


def decode_all(items: list[Item], form: Form, out: Pixels, files: Files) -> list[tuple[int, str]]:
    """Decode into out [n, channels, height, width]; (place, what is wrong) of the bad ones."""
    bad = []
    for place, item in enumerate(items):
        try:
            out[place] = decode(files.read(item), form)
        except (ValueError, OSError) as error:
            bad.append((place, str(error)))
    return bad


def request(path: str, size: int, first: int, items: list[Item], form: Form) -> str:
    """A line that asks for `items` at sample `first` of the shared file of `size` bytes."""
    told: dict[str, Any] = {"path": path, "size": size, "first": first, "form": asdict(form)}
    return json.dumps({**told, "items": items}) + "\n"


def _serve() -> None:
    files, shared = Files(), dict[str, mmap.mmap]()
    gc.freeze()  # the modules' objects are not looked through again at every hundredth image
    for line in sys.stdin:
        told = json.loads(line)
        form, items = Form(**told["form"]), told["items"]
        if told["path"] not in shared:
            with open(told["path"], "r+b") as file:
                shared[told["path"]] = mmap.mmap(file.fileno(), told["size"])
        area = np.frombuffer(shared[told["path"]], dtype=np.uint8)
        each = form.channels * form.height * form.width
        begin = told["first"] * each
        out = area[begin : begin + len(items) * each].reshape(len(items), *form.shape)
        print(json.dumps(decode_all(items, form, out, files)), flush=True)


if __name__ == "__main__":
    _serve()
