"""Decoding images, in this process or in others.

This module imports nothing heavy, so that decoding processes start at once. A decoding process runs
`serve`: it reads one JSON request a line, writes pixels into a shared file, and answers each request
with a line. It ends when its input ends, so it never outlives the process that started it.
"""

import gc
import json
import mmap
import os
import stat
import sys
from collections import OrderedDict
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels = npt.NDArray[np.uint8]
Item = tuple[str, int, int]
"""Where the bytes of an image lie: (file, first byte, number of bytes; 0 for the whole file)."""
_OPEN_FILES = 128
_MODES = {1: "L", 3: "RGB"}
_ORIENTATION = 0x0112  # the EXIF tag
_ANIMATED = ("GIF", "WEBP", "PNG", "TIFF")  # in these formats, further frames are no other form of the first


@dataclass(frozen=True)
class ImageForm:
    """What every image becomes: bytes [channels, height, width].

    resize: whether an image of another size is scaled; else it is refused.
    background: the grey value, 0 to 255, that shows through transparent pixels; with None, an image
    that has any is refused.
    """

    channels: int
    height: int
    width: int
    resize: bool
    background: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


class FileReader:
    """Reads bytes of files and keeps the last files open: a tar shard holds thousands of images.

    For one thread at a time: a file that another thread closes could be another file by then.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, item: Item) -> bytes:
        """Raises OSError, and ValueError for what isn't a regular file."""
        file, first, size = item
        if size == 0:
            return read_whole(file)
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return os.pread(self._open[file], size, first)


def read_whole(file: str) -> bytes:
    """A file's bytes by three system calls: for a small image, Python's `open` takes as long as the decoding.

    Raises OSError, and ValueError for a named pipe, a socket or a device, which might never end.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # opening a named pipe would wait for a writer
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        size = status.st_size
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def decode(content: bytes, form: ImageForm) -> Pixels:
    """Bytes [channels, height, width]. Raises ValueError, in words for the user, for an image that can't become that."""
    wanted = (form.width, form.height) if form.resize else None
    image = open_image(content, _MODES[form.channels], form.background, wanted)
    if image.size != (form.width, form.height):
        if not form.resize:
            raise ValueError(
                f"has {image.height}×{image.width} pixels, not {form.height}×{form.width}; "
                "set data.size to scale all images"
            )
        image = image.resize((form.width, form.height), Image.Resampling.BILINEAR)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if form.channels == 1 else array.transpose(2, 0, 1)


def open_image(
    content: bytes, mode: str | None, background: int | None = None, wanted: tuple[int, int] | None = None
) -> Image.Image:
    """The image as it is seen, upright, in mode L or RGB; with a mode of None, in whichever its pixels need.

    wanted: (width, height) that is enough, where it will be scaled to that.
    Raises ValueError, in words for the user, for what can't be decoded or shown in 8 bits a channel.
    """
    try:
        image: Image.Image = Image.open(BytesIO(content))
        turned = _is_turned(image)
        if wanted is not None:
            # For JPEG: decodes at a fraction of the size, which is faster by the square of the fraction.
            image.draft(mode, wanted[::-1] if turned else wanted)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"is not an image ({len(content)} bytes)") from error
    except Exception as error:  # PIL's decoders raise a dozen kinds
        raise ValueError(f"can't be decoded: {' '.join(str(error).split())}") from error
    if mode is None:
        mode = "L" if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16") else "RGB"
    return _converted(_upright(image), mode, background)


def upright_size(content: bytes) -> tuple[int, int]:
    """(height, width) of an image as it is shown. Raises ValueError for what isn't an image."""
    try:
        with Image.open(BytesIO(content)) as image:
            width, height = image.size
            return (width, height) if _is_turned(image) else (height, width)
    except Exception as error:
        raise ValueError(f"is not an image: {' '.join(str(error).split())}") from error


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation: 1 is upright, 5 to 8 are turned by a quarter."""
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return 1  # for a small image, looking for the tag takes a tenth of the decoding's time
    orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if isinstance(orientation, int) else 1


def _is_turned(image: Image.Image) -> bool:
    return _orientation(image) in (5, 6, 7, 8)


def _upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says that it is to be shown."""
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _converted(image: Image.Image, mode: str, background: int | None) -> Image.Image:
    """The image in mode L or RGB. Raises ValueError where PIL's own conversion would change what is seen."""
    if image.format in _ANIMATED and getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", 2)
        raise ValueError(f"is animated or has several pages ({frames}): give one image a file")
    if image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode in ("I", "F"):
        kind = "integers of 32 bits" if image.mode == "I" else "floats"
        raise ValueError(
            f"has {kind} as pixels, and what they mean as brightness isn't known: convert it to 8 or 16 bits, or "
            "give the pixels as arrays (data=arrays)"
        )
    if image.has_transparency_data:
        image = _on_background(image.convert("RGBA"), background)
    if image.mode != mode:  # a conversion to the same mode would copy
        try:
            image = image.convert(mode)
        except ValueError as error:
            raise ValueError(f"can't be converted from {image.mode} to {mode}: {error}") from error
    return image


def _from_16_bits(image: Image.Image) -> Image.Image:
    """The upper 8 of 16 bits, as PIL does for colour images of 16 bits."""
    values = np.asarray(image).astype(np.uint16)
    most = int(values.max(initial=0))
    if 0 < most < 1 << 12:
        raise ValueError(
            f"has 16 bits a pixel but no value above {most}: the upper 8 bits, which are read, would hold next to "
            "nothing; scale the pixels to 0 … 65535, or give them as arrays (data=arrays)"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def _on_background(image: Image.Image, background: int | None) -> Image.Image:
    """An RGBA image over a grey background, as RGB. Raises ValueError where it needs one and there is none."""
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    if background is None:
        raise ValueError(
            "has transparent pixels: set the grey value to put behind them, data.background=255 (white) or 0 (black)"
        )
    flat = Image.new("RGBA", image.size, (background, background, background, 255))
    return Image.alpha_composite(flat, image).convert("RGB")


def decode_all(items: list[Item], form: ImageForm, out: Pixels, files: FileReader) -> list[tuple[int, str]]:
    """Decode into out [n, channels, height, width]; returns (place, what is wrong) for each bad image."""
    bad = []
    for place, item in enumerate(items):
        try:
            out[place] = decode(files.read(item), form)
        except (ValueError, OSError) as error:
            bad.append((place, str(error)))
    return bad


def request(path: str, size: int, first: int, items: list[Item], form: ImageForm) -> str:
    """A line that asks for `items`, from sample `first` of the shared file of `size` bytes on."""
    fields: dict[str, Any] = {"path": path, "size": size, "first": first, "form": asdict(form), "items": items}
    return json.dumps(fields) + "\n"


def serve() -> None:
    """Answer requests from standard input until it ends: for each, one line of (place, what is wrong) of the bad images."""
    files, shared = FileReader(), dict[str, mmap.mmap]()
    gc.freeze()  # garbage collections needn't look through the objects of the imported modules
    for line in sys.stdin:
        fields = json.loads(line)
        form, items = ImageForm(**fields["form"]), fields["items"]
        if fields["path"] not in shared:
            with open(fields["path"], "r+b") as file:
                shared[fields["path"]] = mmap.mmap(file.fileno(), fields["size"])
        area = np.frombuffer(shared[fields["path"]], dtype=np.uint8)
        each = form.channels * form.height * form.width
        begin = fields["first"] * each
        out = area[begin : begin + len(items) * each].reshape(len(items), *form.shape)
        print(json.dumps(decode_all(items, form, out, files)), flush=True)


if __name__ == "__main__":
    serve()
