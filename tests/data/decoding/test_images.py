"""Oracles: Pillow's own resize, the original pixels, torchvision's crop algorithm drawn with numpy, corrupt bytes."""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.decoding.image_probe import ImageError
from lcl_megatron.data.decoding.images import (
    Box,
    TrainingTransform,
    blank_image,
    decode_rgb,
    evaluation_image,
    resize,
)

MAX_PIXELS = 64_000_000


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with fine noise, so that a resize has both to deal with."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(coarse).astype(int) + rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format_name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_zeros(width: int, height: int, rows: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(rows)) + packer.flush()
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("size", "tolerance"),
    [((500, 375), 1), ((640, 480), 1), ((375, 500), 1), ((224, 224), 0), ((97, 61), 2), ((64, 300), 2), ((1, 1), 0)],
)
def test_resize_agrees_with_pillow_within_one_of_255(size: tuple[int, int], tolerance: int) -> None:
    """2 of 255 where it enlarges: measured on 1 to 3 of 150,000 noisy values.

    Pillow is asked for the horizontal pass first, as torch and Pillow before version 12 do it; newer ones begin with
    the vertical pass where that is less work, which shifts roundings by 0.25 on average and 3 at most.
    """
    image = photo(*size)
    found = resize(np.asarray(image), 224, 224).permute(1, 2, 0).numpy().astype(int)
    horizontal = image.resize((224, image.height), Image.Resampling.BICUBIC)
    expected = np.asarray(horizontal.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(found - expected)
    assert difference.max() <= tolerance
    assert difference.mean() < 0.01


@pytest.mark.parametrize(
    ("format_name", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "1", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("PPM", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("GIF", "P", {}),
        ("JPEG2000", "RGB", {}),
    ],
)
def test_lossless_formats_give_the_original_pixels(format_name: str, mode: str, options: dict[str, object]) -> None:
    image = photo(40, 30).convert(mode)
    found = decode_rgb(encode(image, format_name, **options), MAX_PIXELS)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_is_rgb_and_close_to_the_original(mode: str) -> None:
    """Without the noise, whose colours 4:2:0 JPEG does not keep."""
    image = photo(64, 48).resize((16, 12)).resize((64, 48)).convert(mode)
    found = decode_rgb(encode(image, "JPEG", quality=95, progressive=True), MAX_PIXELS)
    assert np.abs(found.astype(int) - np.asarray(image.convert("RGB")).astype(int)).mean() < 4


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    found = decode_rgb(encode(Image.fromarray(values), "PNG"), MAX_PIXELS)
    assert np.array_equal(found[..., 0], np.round(values / 257).astype(np.uint8))


def test_exif_orientation_is_ignored_as_in_openclip() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encode(photo(40, 30), "JPEG", exif=exif), MAX_PIXELS).shape == (30, 40, 3)


JPEG = encode(photo(120, 90), "JPEG", quality=85)
PNG = encode(photo(120, 90), "PNG")
FRAME = JPEG.index(b"\xff\xc0") + 5
CORRUPT = {
    "nothing": (b"", "no bytes"),
    "one byte": (b"\xff", "no image of a known format"),
    "start of a JPEG": (b"\xff\xd8\xff", "no image of a known format"),
    "page not found": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "begin with b'<!DOCTYPE ht'"),
    "vector graphics": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>', "known format"),
    "zeros": (bytes(10_000), "no image of a known format"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "JPEG header only": (JPEG[: FRAME + 20], "cannot be decoded|known format"),
    "half a progressive JPEG": (encode(photo(120, 90), "JPEG", progressive=True)[:2000], "truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated|cannot be decoded"),
    "PNG with wrong bits": (PNG[:5000] + bytes([PNG[5000] ^ 0xFF]) + PNG[5001:], "cannot be decoded"),
    "half a WebP": (encode(photo(120, 90), "WEBP")[:900], "cannot be decoded|known format"),
    "PNG bomb": (png_of_zeros(9_000, 9_000, 9_000), "9000 x 9000 pixels, more than 64000000"),
    "PNG header of 3.6 gigapixels": (png_of_zeros(60_000, 60_000, 1), "60000|exceeds limit"),
    "JPEG header of 4.3 gigapixels": (
        JPEG[:FRAME] + struct.pack(">HH", 65500, 65500) + JPEG[FRAME + 4 :],
        "65500|exceeds limit",
    ),
    "no pixels": (png_of_zeros(0, 0, 0), "known format|0 x 0"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "known format"),
    "floating point": (encode(Image.fromarray(np.ones((8, 8), dtype=np.float32)), "TIFF"), "has no white"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_bad_image_is_an_error_that_says_why(name: str) -> None:
    data, reason = CORRUPT[name]
    transform = TrainingTransform(size=32, seed=0)
    for decode in (lambda: transform(data, 1), lambda: evaluation_image(data, 32)):
        with pytest.raises(ImageError, match=reason):
            decode()


def test_odd_but_whole_images_decode() -> None:
    transform = TrainingTransform(size=32, seed=0)
    animation = [photo(40, 30, i) for i in range(3)]
    for data in (
        JPEG + bytes(1000),
        JPEG[:-2],  # only the end marker is missing
        encode(photo(1, 1), "PNG"),
        encode(photo(2000, 4), "PNG"),
        encode(animation[0], "GIF", save_all=True, append_images=animation[1:]),
        encode(photo(40, 30).convert("LA"), "PNG"),
    ):
        assert transform(data, 3).shape == (3, 32, 32)


def torchvision_boxes(height: int, width: int, count: int) -> np.ndarray:
    """``RandomResizedCrop.get_params`` for scale (0.9, 1) and ratio (3/4, 4/3), drawn with numpy."""
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(count):
        for _ in range(10):
            area = height * width * rng.uniform(0.9, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                boxes.append((rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w))
                break
        else:
            boxes.append(central_box(height, width))
    return np.array(boxes, dtype=float)


def central_box(height: int, width: int) -> tuple[int, int, int, int]:
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 300), (480, 640)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    transform = TrainingTransform(size=224, seed=5)
    count = 4000
    found = np.array([transform.box(key, height, width) for key in range(count)], dtype=float)
    expected = torchvision_boxes(height, width, count)
    error = 4 * np.sqrt((found.var(axis=0) + expected.var(axis=0)) / count)
    assert (np.abs(found.mean(axis=0) - expected.mean(axis=0)) <= error).all()
    np.testing.assert_allclose(found.std(axis=0), expected.std(axis=0), rtol=0.1)
    assert (found[:, 0] + found[:, 2] <= height).all()
    assert (found[:, 1] + found[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(4, 8000), (8000, 4), (1, 1), (100, 1)])
def test_extreme_images_get_the_central_crop(height: int, width: int) -> None:
    assert TrainingTransform(size=224, seed=5).box(9, height, width) == Box(*central_box(height, width))


def test_crop_is_a_function_of_seed_and_key() -> None:
    boxes = [TrainingTransform(size=8, seed=seed).box(key, 375, 500) for seed in (0, 1) for key in (5, 6)]
    assert len(set(boxes)) == 4
    assert boxes[0] == TrainingTransform(size=99, seed=0).box(5, 375, 500)


def test_training_image_is_the_resized_crop() -> None:
    image = photo(120, 90)
    transform = TrainingTransform(size=48, seed=2)
    box = transform.box(11, 90, 120)
    area = (box.left, box.top, box.left + box.width, box.top + box.height)
    expected = np.asarray(image.crop(area).resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    found = transform(encode(image, "PNG"), 11)
    assert found.dtype == torch.uint8
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(120, 90), (90, 121), (64, 64), (20, 30)])
def test_evaluation_image_is_the_centre_of_the_resized_image(size: tuple[int, int]) -> None:
    """As torchvision: ``Resize(64)`` makes the long side ``int(64 * long / short)``; ``CenterCrop`` uses ``round``."""
    image = photo(*size)
    short, long = min(size), max(size)
    new = (64, int(64 * long / short)) if size[0] <= size[1] else (int(64 * long / short), 64)
    left, top = round((new[0] - 64) / 2), round((new[1] - 64) / 2)
    expected = image.resize(new, Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64))
    found = evaluation_image(encode(image, "PNG"), 64).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1


def test_evaluation_image_that_would_grow_beyond_the_limit_is_refused() -> None:
    with pytest.raises(ImageError, match="become 448000 x 224"):
        evaluation_image(encode(photo(8000, 4), "PNG"), 224)


def test_blank_image_is_the_mean_colour() -> None:
    assert blank_image(4)[:, 1, 2].tolist() == list(BLANK_PIXEL)


@pytest.mark.parametrize(("ratio", "width", "height"), [((3.0, 4.0), 1, 50), ((0.25, 0.3), 50, 1), ((3.0, 4.0), 1, 1)])
def test_a_crop_has_a_pixel_whatever_the_shape(ratio: tuple[float, float], width: int, height: int) -> None:
    transform = TrainingTransform(size=8, seed=0, crop_ratio=ratio)
    for key in range(20):
        box = transform.box(key, height, width)
        assert 1 <= box.height <= height - box.top
        assert 1 <= box.width <= width - box.left
