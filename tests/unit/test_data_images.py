"""Images, by folder and in tar shards: the pixels that were written, and bad ones by name."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from descent.data.bad_records import BadRecords, read_good
from descent.data.decoder_pool import DecoderPool
from descent.data.image_decoding import ImageForm
from descent.data.images import Images
from descent.data.sharded_sets import make_index, verify
from descent.storage import open_store
from tests.unit.test_data_refusals import refusal


def quiet(*_: object) -> None:
    """No progress."""


def digits(count: int = 120) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    return (pixels[:count].reshape(-1, 8, 8) * 15).astype(np.uint8), labels[:count]


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    return content.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Digits as PNG files, a folder per class; (folder, pixels, labels) in the data set's order."""
    pixels, labels = digits()
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        place = tmp_path / "images" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:04d}.png").write_bytes(png(image))
    order = np.argsort(labels, kind="stable")
    return tmp_path / "images", pixels[order], labels[order]


def write_tars(folder: Path, pixels: np.ndarray, labels: np.ndarray, with_cls: bool) -> None:
    folder.mkdir()
    for shard, rows in enumerate(np.array_split(np.arange(len(labels)), 3)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for row in rows:
                stem = f"{row:04d}" if with_cls else f"{labels[row]}/{row:04d}"
                files = {f"{stem}.png": png(pixels[row])}
                if with_cls:
                    files[f"{stem}.cls"] = str(labels[row]).encode()
                for name, content in files.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def test_batches_read_by_several_threads_at_once_are_not_mixed_up(folder):
    path, pixels, labels = folder
    data = Images(str(path), channels=1, processes=2, keep_mb=0.0)
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 120, int(size)) for size in rng.integers(1, 60, 40)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(data.gather, batches))
    for chosen, (inputs, targets) in zip(batches, found, strict=True):
        np.testing.assert_allclose(inputs.numpy()[:, 0] * 255, pixels[chosen], atol=1e-4)
        assert targets.tolist() == labels[chosen].tolist()


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("keep_mb", [0.0, 64.0])
def test_a_folder_per_class_gives_the_pixels_and_classes(folder, processes, keep_mb):
    path, pixels, labels = folder
    data = Images(str(path), channels=1, mean=0.5, std=0.25, processes=processes, keep_mb=keep_mb)
    assert (len(data), data.input_shape, data.num_outputs) == (120, (1, 8, 8), 10)
    rng = np.random.default_rng(0)
    for _ in range(3):
        chosen = rng.integers(0, 120, 50)
        inputs, targets = data.gather(chosen)
        np.testing.assert_allclose(inputs.numpy()[:, 0], (pixels[chosen] / 255 - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(targets, labels[chosen])
        torch.testing.assert_close(data[int(chosen[0])][0], inputs[0])


@pytest.mark.parametrize("with_cls", [False, True])
def test_tar_shards_give_the_same_as_the_folder(folder, tmp_path, with_cls):
    path, pixels, labels = folder
    write_tars(tmp_path / "tars", pixels, labels, with_cls)
    index = make_index(tmp_path / "tars", quiet)
    assert index.about["classes"] == [str(i) for i in range(10)]
    assert verify(open_store(str(tmp_path / "tars")), index, quiet) == []
    shards = Images(str(tmp_path / "tars"), channels=1, processes=2)
    whole = Images(str(path), channels=1)
    everything = np.arange(120)
    torch.testing.assert_close(shards.gather(everything), whole.gather(everything))
    assert shards.layout is None
    assert Images(str(tmp_path / "tars"), channels=1, window=50).layout.starts.tolist() == [0, 40, 80, 120]


def test_colour_scaling_and_greys_become_what_was_asked(tmp_path):
    (tmp_path / "a").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    (tmp_path / "a" / "0.png").write_bytes(png(colours))
    (tmp_path / "a" / "1.png").write_bytes(png(colours[:, :, 0]))
    data = Images(str(tmp_path), mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    inputs, _ = data.gather(np.array([0, 1]))
    expected = colours.transpose(2, 0, 1) / 255
    for channel, (mean, std) in enumerate([(0.1, 1), (0.2, 2), (0.3, 4)]):
        np.testing.assert_allclose(inputs[0, channel], (expected[channel] - mean) / std, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(inputs[1, channel], (expected[0] - mean) / std, rtol=1e-5, atol=1e-6)
    assert Images(str(tmp_path), size=[3, 5]).gather(np.array([0]))[0].shape == (1, 3, 3, 5)


@pytest.mark.parametrize("processes", [0, 2])
def test_bad_images_are_named_all_at_once_and_replaced_by_the_next_good_one(folder, processes):
    path, pixels, _ = folder
    files = sorted(path.rglob("*.png"))
    files[7].write_bytes(files[7].read_bytes()[:60])
    files[8].write_text("no image")
    files[50].write_bytes(png(np.zeros((3, 4), np.uint8)))
    data = Images(str(path), channels=1, processes=processes)
    chosen = np.array([3, 50, 7, 8, 7])
    with pytest.raises(BadRecords) as caught:
        data.gather(chosen)
    assert sorted(caught.value.rows) == [1, 2, 3, 4]
    assert str(caught.value).startswith(f"{files[50]} (sample 50): has 3×4 pixels, not 8×8")
    (inputs, _), replaced = read_good(data.gather, chosen, len(data), "skip")
    np.testing.assert_allclose(inputs.numpy()[:, 0], pixels[[3, 51, 9, 9, 9]] / 255, rtol=1e-5, atol=1e-6)
    assert replaced == 4
    with pytest.raises(BadRecords, match=r"data\.on_error=skip takes the next"):
        read_good(data.gather, chosen, len(data), "fail")
    for sample, words in ((7, "can't be decoded: "), (8, "is not an image")):
        with pytest.raises(BadRecords, match=words):
            data.gather(np.array([sample]))


def test_a_bad_image_in_a_tar_is_named_by_shard_and_index(folder, tmp_path):
    _, pixels, labels = folder
    write_tars(tmp_path / "tars", pixels, labels, False)
    make_index(tmp_path / "tars", quiet)
    data = Images(str(tmp_path / "tars"), channels=1)
    first, size = data._files._extents[45].tolist()
    shard = tmp_path / "tars" / "1.tar"
    content = bytearray(shard.read_bytes())
    content[first : first + size] = bytes(size)
    shard.write_bytes(content)
    with pytest.raises(BadRecords, match=r"tars/1\.tar, image 5 \(from 0\): is not an image"):
        data.gather(np.array([44, 45]))
    said = verify(open_store(str(tmp_path / "tars")), data._files.shards.index, quiet)
    assert len(said) == 1 and "tars/1.tar: is corrupt" in said[0]


def test_decoding_processes_end_with_their_owner(folder):
    path, _, _ = folder
    decoder = DecoderPool(ImageForm(1, 8, 8, False), 2)
    items = [(str(file), 0, 0) for file in sorted(path.rglob("*.png"))]
    decoder.read(items)
    children = [decoder._idle.get() for _ in range(2)]
    del decoder
    assert [child.wait(10) is not None for child in children] == [True, True]


def test_what_is_no_image_set_is_refused(tmp_path):
    assert "data.path is not set" in refusal(Images)
    assert "doesn't exist: give a folder" in refusal(Images, str(tmp_path / "none"))
    assert "has no folders of images" in refusal(Images, str(tmp_path))
    (tmp_path / "cat").mkdir()
    assert f"{tmp_path / 'cat'}: holds no image" in refusal(Images, str(tmp_path))
    (tmp_path / "cat" / "1.png").write_text("x")
    assert "cat/1.png (sample 0): is not an image" in refusal(Images, str(tmp_path))
    assert "channels=2 must be 3 (colour) or 1 (grey)" in refusal(Images, str(tmp_path), channels=2)
    assert "size=[8] must be [height, width]" in refusal(Images, str(tmp_path), size=[8])
    assert "one for each of 3 channels" in refusal(Images, str(tmp_path), size=[8, 8], mean=[0.0])
    assert "std=0.0 must be above 0" in refusal(Images, str(tmp_path), size=[8, 8], std=0.0)


def test_what_cannot_be_indexed_is_refused(tmp_path):
    assert "holds no such files" in refusal(make_index, tmp_path, quiet)
    (tmp_path / "0.tar").write_text("no tar")
    assert "0.tar: is not a whole, uncompressed tar" in refusal(make_index, tmp_path, quiet)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    assert "member a.png: has no class" in refusal(make_index, tmp_path, quiet)
    (tmp_path / "1.bin").write_bytes(b"123")
    assert "holds *.tar and *.bin" in refusal(make_index, tmp_path, quiet)
    (tmp_path / "0.tar").unlink()
    assert "give --dtype uint8|uint16|uint32" in refusal(make_index, tmp_path, quiet)
    assert "its 3 bytes are no whole number of uint16" in refusal(
        make_index, tmp_path, quiet, dtype="uint16", vocabulary=9
    )
