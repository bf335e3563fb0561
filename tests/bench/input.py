"""The input path alone: samples a second of the real `Feed`, with nothing computed in between.

Against indexing tensors in memory by a fresh permutation (arrays, tokens), and against torch's
DataLoader, shuffling, with as many processes as the feed reads with beside its own (none
for all but images, which decode in two). Real data: digits enlarged, Python's own
source, digits as PNG and as Parquet. Both sides take turns.

Tokens in memory are what training takes, int64 [block], as inputs and targets; arrays are float32.
Images decode in every epoch (`keep_mb=0`); what keeping the pixels gives is `images_kept`.
"""

import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tests.bench.measure import Result, result_of, worst

_BATCH = 256
_SECONDS = 1.0
_TURNS = 3
_PROCESSES = 2
Pair = tuple[torch.Tensor, torch.Tensor]


def run() -> list[Result]:
    """A result per kind and alternative, and the worst of them as `input`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = [*_arrays(Path(folder)), *_tokens(Path(folder)), *_parquet(Path(folder)), *_images(Path(folder))]
    return [*results, worst("input", [r for r in results if r.target is not None])]


def _digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits enlarged to 24×24, as often as needed: bytes [count, 24, 24], labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    large = (pixels.reshape(-1, 8, 8) * 15).astype(np.uint8).repeat(3, axis=1).repeat(3, axis=2)
    rows = np.arange(count) % len(large)
    return large[rows], labels[rows]


def _feed(data: Any) -> Iterator[Pair]:
    from descent.training.input.feed import Feed
    from descent.training.input.sampling import SampleOrder

    order = SampleOrder.of(data, _BATCH, seed=0)
    feed = Feed(data, order, torch.device("cpu"))
    step = 0
    while True:
        step += 1
        feed.prepare(step, [(0, (0, _BATCH))], _BATCH)
        yield feed.fetch(step, 0, _BATCH)


def _indexing(inputs: torch.Tensor, targets: torch.Tensor) -> Iterator[Pair]:
    while True:
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs) - _BATCH + 1, _BATCH):
            at = order[start : start + _BATCH]
            yield inputs[at], targets[at]


def _loader(data: Dataset[Any], processes: int = 0) -> Iterator[Pair]:
    loader = DataLoader(
        data,
        _BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=processes,
        persistent_workers=processes > 0,
    )
    while True:
        yield from loader


def _rate(batches: Iterator[Pair]) -> float:
    """Samples a second; each batch is looked at, so that nothing is left to be done lazily."""
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < _SECONDS:
        inputs, targets = next(batches)
        inputs[0, 0].sum(), targets[0]
        count += len(inputs)
    return count / (time.perf_counter() - begin)


def _compare(
    name: str,
    ours: Callable[[], Iterator[Pair]],
    theirs: Callable[[], Iterator[Pair]],
    target: float | None,
    **detail: Any,
) -> Result:
    mine, other = ours(), theirs()
    for batches in (mine, other):
        for _ in range(5):
            next(batches)
    pairs = [(_rate(mine), _rate(other)) for _ in range(_TURNS)]
    return result_of(name, pairs, target, "higher", unit="samples/s", **detail)


class _Rows(Dataset[Any]):
    """What a user writes for tensors: one sample at a time."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Pair:
        return self.inputs[index], self.targets[index]


def _arrays(folder: Path) -> list[Result]:
    from descent.data.arrays import Arrays

    pixels, labels = _digits(20_000)
    inputs = pixels.reshape(len(pixels), 1, 24, 24).astype(np.float32) / 255
    np.save(folder / "x.npy", inputs)
    np.save(folder / "y.npy", labels)
    data = Arrays(inputs=str(folder / "x.npy"), targets=str(folder / "y.npy"))
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    return [
        _compare("arrays_memory", lambda: _feed(data), lambda: _indexing(x, y), 0.9),
        _compare("arrays_loader", lambda: _feed(data), lambda: _loader(_Rows(x, y)), 1.5),
    ]


def _tokens(folder: Path) -> list[Result]:
    from descent.data.tokenize import Bytes, tokenize
    from descent.data.tokens import Tokens

    source = Path(sysconfig.get_paths()["stdlib"])
    tokenize(source, folder / "tokens", Bytes(), pattern="*.py", shard_tokens=1 << 20)
    data = Tokens(str(folder / "tokens"), 128)
    inputs, targets = data.gather(np.arange(len(data)))
    return [
        _compare("tokens_memory", lambda: _feed(data), lambda: _indexing(inputs, targets), 0.9),
        _compare("tokens_loader", lambda: _feed(data), lambda: _loader(_Rows(inputs, targets)), 1.5),
    ]


class _ParquetRows(Dataset[Any]):
    """A table read into memory by pandas, a row at a time."""

    def __init__(self, file: Path) -> None:
        import pandas as pd

        table = pd.read_parquet(file)
        self.inputs = np.array(table.drop(columns="label"), dtype=np.float32)
        self.targets = table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.inputs[index]), int(self.targets[index])


def _parquet(folder: Path) -> list[Result]:
    import pandas as pd

    from descent.data.parquet import Parquet

    pixels, labels = _digits(50_000)
    table = pd.DataFrame(pixels[:, ::3, ::3].reshape(len(pixels), -1).astype(np.float32))
    table.columns = [f"p{i}" for i in range(64)]
    table["label"] = labels
    file = folder / "digits.parquet"
    table.to_parquet(file, row_group_size=5000)
    memory = Parquet(str(file), "label")
    groups = Parquet(str(file), "label", memory_mb=0.0)
    rows = _ParquetRows(file)
    return [
        _compare("parquet_loader", lambda: _feed(memory), lambda: _loader(rows), 1.5),
        _compare("parquet_groups_loader", lambda: _feed(groups), lambda: _loader(rows), 1.5),
    ]


class _ImageFiles(Dataset[Any]):
    """torchvision's ImageFolder with ToTensor, as far as it matters here."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.rglob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        file = self.files[index]
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.array(image.convert("L")))
        return pixels[None].float().div(255), int(file.parent.name)


def _images(folder: Path) -> list[Result]:
    from PIL import Image

    from descent.data.images import Images

    pixels, labels = _digits(4000)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = folder / "images" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.png")
    path = str(folder / "images")
    decoding = Images(path, channels=1, processes=_PROCESSES, keep_mb=0.0)
    kept = Images(path, channels=1, processes=_PROCESSES)
    files = _ImageFiles(folder / "images")
    others = lambda: _loader(files, _PROCESSES)  # noqa: E731
    return [
        _compare("images_loader", lambda: _feed(decoding), others, 1.5, processes=_PROCESSES),
        _compare("images_kept_loader", lambda: _feed(kept), others, 1.5, processes=_PROCESSES),
    ]
