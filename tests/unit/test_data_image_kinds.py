"""Every kind of image file: the pixels as they are seen, or refused by name."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from descent.data.bad_records import BadRecords
from descent.data.hugging_face import HuggingFace
from descent.data.image_decoding import ImageForm, decode
from descent.data.images import Images
from tests.unit.data_refusal import refusal

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def content(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def decoded(raw: bytes, channels: int = 3, background: int | None = None, **form: object) -> np.ndarray:
    return decode(raw, ImageForm(channels, **{"height": 8, "width": 8, "resize": False, **form}, background=background))


def why(raw: bytes, **options: object) -> str:
    with pytest.raises(ValueError) as caught:
        decoded(raw, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits_are_read_by_their_brightness(channels, kind):
    values = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    pixels = decoded(content(Image.fromarray(values), kind), channels)
    for channel in pixels:
        np.testing.assert_allclose(channel / 255, values / 65535, atol=1 / 255)


def test_16_bits_that_use_only_the_lowest_are_refused_and_a_black_one_is_black():
    dim = content(Image.fromarray(np.full((8, 8), 4000, dtype=np.uint16)))
    assert "16 bits a pixel but no value above 4000" in why(dim)
    assert decoded(content(Image.fromarray(np.zeros((8, 8), dtype=np.uint16)))).max() == 0


@pytest.mark.parametrize(("dtype", "words"), [(np.int32, "integers of 32 bits"), (np.float32, "floats as pixels")])
def test_pixels_without_a_known_range_are_refused(dtype, words):
    assert words in why(content(Image.fromarray(RAMP.astype(dtype)), "tiff"))


def test_opaque_images_of_any_mode_are_what_is_seen():
    colour, grey = Image.fromarray(COLOURS), Image.fromarray(RAMP)
    for image in (colour.convert("RGBA"), grey.convert("LA")):
        expected = np.asarray(colour if image.mode == "RGBA" else grey.convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_array_equal(decoded(content(image)), expected)
    palette = colour.quantize(256)
    np.testing.assert_array_equal(decoded(content(palette)), np.asarray(palette.convert("RGB")).transpose(2, 0, 1))
    bits = Image.fromarray(RAMP > 100)
    np.testing.assert_array_equal(decoded(content(bits), 1)[0], (RAMP > 100) * 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_cmyk_is_paper_minus_ink(channels):
    inks = np.random.default_rng(1).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels = decoded(content(Image.frombytes("CMYK", (8, 8), inks.tobytes()), "tiff"), channels)
    paper = 255 - inks.astype(float)
    expected = (paper[:, :, :3] * paper[:, :, 3:] / 255).transpose(2, 0, 1)
    if channels == 1:
        expected = np.tensordot([0.299, 0.587, 0.114], expected, 1)[None]
    np.testing.assert_allclose(pixels, expected, atol=2)


def with_transparency(kind: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """(file, colours [8, 8, 3], alpha [8, 8] of 0 to 1)."""
    alpha = np.where(RAMP > 100, 255, 0).astype(np.uint8)
    if kind == "alpha":
        alpha = RAMP
        return content(Image.fromarray(np.dstack([COLOURS, alpha]))), COLOURS, alpha / 255
    if kind == "grey":
        return content(Image.fromarray(np.dstack([RAMP, alpha]), "LA")), np.dstack([RAMP] * 3), alpha / 255
    if kind == "palette":
        image = Image.fromarray((RAMP > 100).astype(np.uint8), "P")
        image.putpalette([200, 10, 10, 10, 200, 10])
        colours = np.where((RAMP > 100)[:, :, None], [10, 200, 10], [200, 10, 10])
        return content(image, transparency=0), colours, alpha / 255
    pixels = np.where((RAMP > 100)[:, :, None], COLOURS | 1, [0, 0, 0]).astype(np.uint8)
    return content(Image.fromarray(pixels), transparency=(0, 0, 0)), pixels, alpha / 255


@pytest.mark.parametrize("kind", ["alpha", "grey", "palette", "one colour"])
def test_transparent_pixels_show_the_background_or_are_refused(kind):
    raw, colours, alpha = with_transparency(kind)
    assert "has transparent pixels: set the grey value" in why(raw)
    for background in (0, 255):
        expected = colours * alpha[:, :, None] + background * (1 - alpha[:, :, None])
        np.testing.assert_allclose(decoded(raw, background=background), expected.transpose(2, 0, 1), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_images_are_upright_as_their_exif_orientation_says(orientation, kind):
    stored = Image.fromarray(np.kron(RAMP[:6], np.ones((8, 8), dtype=np.uint8)))  # 48 × 64
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = content(stored, kind, exif=exif, **({"quality": 100} if kind in ("jpeg", "webp") else {}))
    seen = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("L"))
    assert seen.shape == ((48, 64) if orientation < 5 else (64, 48))
    height, width = seen.shape
    np.testing.assert_array_equal(decoded(raw, 1, height=height, width=width)[0], seen)
    small = decoded(raw, 1, height=height // 8, width=width // 8, resize=True)[0]
    np.testing.assert_allclose(small, seen.reshape(height // 8, 8, width // 8, 8).mean((1, 3)), atol=12)


def test_the_first_images_size_is_the_upright_one(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a" / "0.png").write_bytes(content(Image.fromarray(RAMP[:6]), exif=exif))
    data = Images(str(tmp_path), channels=1)
    assert data.input_shape == (1, 8, 6)
    np.testing.assert_allclose(data[0][0][0] * 255, np.rot90(RAMP[:6], -1), atol=1e-4)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_animations_and_pages_are_refused(kind):
    frames = [Image.fromarray(np.roll(COLOURS, i, 0)) for i in range(3)]
    raw = content(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "is animated or has several pages (3)" in why(raw)
    assert decoded(content(frames[0], kind)).shape == (3, 8, 8)


def saved(folder, images: list[bytes]) -> str:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": raw, "path": None} for raw in images], "label": [i % 2 for i in range(len(images))]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return str(folder)


def test_images_of_a_hugging_face_data_set_are_what_is_seen_too(tmp_path):
    palette, exif = Image.fromarray(COLOURS).quantize(256), Image.Exif()
    exif[0x0112] = 6
    upright = np.rot90(COLOURS, 1)  # turned by a quarter against the clock, which the orientation undoes
    path = saved(tmp_path / "a", [content(palette), content(Image.fromarray(upright.copy()), exif=exif)])
    inputs, _ = HuggingFace(path, scale=1 / 255).gather(np.array([0, 1]))
    expected = [np.asarray(palette.convert("RGB")), COLOURS]
    np.testing.assert_allclose(inputs * 255, np.stack(expected).transpose(0, 3, 1, 2), atol=1e-4)
    deep = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    path = saved(tmp_path / "b", [content(Image.fromarray(deep)), content(Image.fromarray(RAMP))])
    grey, _ = HuggingFace(path, scale=1 / 255).gather(np.array([0, 1]))
    np.testing.assert_allclose(grey[:, 0], np.stack([deep / 65535, RAMP / 255]), atol=1 / 255)
    path = saved(
        tmp_path / "c", [content(Image.fromarray(RAMP)), content(Image.fromarray(RAMP.astype(np.float32)), "tiff")]
    )
    with pytest.raises(BadRecords, match=r"row 1 \(from 0\), column 'image': has floats as pixels") as caught:
        HuggingFace(path, scale=1 / 255).gather(np.array([0, 1]))
    assert caught.value.rows == [1]
    mixed = saved(tmp_path / "d", [content(Image.fromarray(RAMP)), content(Image.fromarray(COLOURS))])
    assert "images of different shapes ((8, 8), (8, 8, 3))" in refusal(
        HuggingFace(mixed, scale=1 / 255).gather, np.array([0, 1])
    )


@pytest.mark.parametrize("processes", [0, 1])
def test_a_refused_kind_is_a_bad_record_with_its_file(tmp_path, processes):
    (tmp_path / "a").mkdir()
    for i in range(4):
        (tmp_path / "a" / f"{i}.tiff").write_bytes(content(Image.fromarray(RAMP), "tiff"))
    (tmp_path / "a" / "2.tiff").write_bytes(content(Image.fromarray(RAMP.astype(np.float32)), "tiff"))
    data = Images(str(tmp_path), channels=1, processes=processes)
    with pytest.raises(BadRecords, match=r"a/2\.tiff \(sample 2\): has floats as pixels"):
        data.gather(np.arange(4))
    (tmp_path / "a" / "0.tiff").write_bytes(b"torn")
    assert "a/0.tiff (sample 0): is not an image" in refusal(Images, str(tmp_path))
    skipping = Images(str(tmp_path), channels=1, processes=processes, on_error="skip")
    assert skipping.input_shape == (1, 8, 8)
    (tmp_path / "a" / "1.tiff").write_bytes(b"torn")
    (tmp_path / "a" / "3.tiff").write_bytes(b"torn")
    assert "none of the first 4 images can be read" in refusal(Images, str(tmp_path), on_error="skip")
