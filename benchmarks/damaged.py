"""Damaged and unusual images, by the kind of what is wrong with them; the same seed gives the same bytes."""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from photos import encode, photo
from PIL import Image

SIDES = (24, 64, 150, 333, 500)
"""Widths of the intact pictures."""


@dataclass(frozen=True)
class Kind:
    """One way to be damaged or unusual."""

    make: Callable[[np.random.Generator], bytes]
    """Makes one."""
    decodes: bool | None
    """Whether such an image can be decoded; None = depends on the bits."""
    weight: float = 1.0
    """How often it occurs, relative to the others."""


@functools.cache
def intact(number: int) -> bytes:
    """Return one of a few dozen intact images of all common formats."""
    width = SIDES[number % len(SIDES)]
    image = photo(number, width, width * 3 // 4 + number % 7)
    formats: list[tuple[str, dict[str, object]]] = [
        ("JPEG", {"quality": 85}),
        ("JPEG", {"quality": 90, "progressive": True}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("WEBP", {"quality": 80}),
    ]
    name, options = formats[number // len(SIDES) % len(formats)]
    return encode(image, name, **options)


NUM_INTACT = 50


def any_intact(rng: np.random.Generator) -> bytes:
    """Return an intact image."""
    return intact(int(rng.integers(NUM_INTACT)))


def cut(rng: np.random.Generator) -> bytes:
    """Return an image without its end, of which 10 to 90 % are left."""
    data = any_intact(rng)
    return data[: int(len(data) * rng.uniform(0.1, 0.9))]


def flip(rng: np.random.Generator) -> bytes:
    """Return an image with 1 to 200 wrong bits."""
    data = np.frombuffer(any_intact(rng), dtype=np.uint8).copy()
    places = rng.integers(0, len(data), rng.integers(1, 200))
    data[places] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return data.tobytes()


def overwrite(rng: np.random.Generator) -> bytes:
    """Return an image with a block of zeros or noise in it."""
    data = bytearray(any_intact(rng))
    begin = int(rng.integers(0, len(data)))
    size = min(int(rng.integers(1, 2000)), len(data) - begin)
    data[begin : begin + size] = rng.bytes(size) if rng.integers(2) else bytes(size)
    return bytes(data)


def garbage(rng: np.random.Generator) -> bytes:
    """Return what is no image at all: a byte, zeros, noise, a web page, a drawing, an archive, a video."""
    page = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>"
    return (
        b"\0",
        bytes(int(rng.integers(1, 5000))),
        b"\x01" + rng.bytes(int(rng.integers(1, 5000))),
        page,
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        b"PK\x03\x04" + rng.bytes(200),
        b"\x00\x00\x00\x18ftypmp42" + rng.bytes(500),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        b"\xff\xd8\xff",
    )[rng.integers(9)]


@functools.cache
def png_of_zeros(width: int, height: int, rows: int) -> bytes:
    """Return a PNG of black pixels, complete if ``rows == height``."""
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(rows)) + packer.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def bomb(rng: np.random.Generator) -> bytes:
    """Return a small file that asks for too much memory or time."""
    sides = ((60_000, 60_000, 1), (30_000, 30_000, 30), (9_000, 9_000, 9_000), (7_900, 7_900, 7_900), (0, 0, 0))
    choice = int(rng.integers(len(sides) + 3))
    if choice < len(sides):
        return png_of_zeros(*sides[choice])
    if choice == len(sides):
        return _many_scans()
    jpeg = bytearray(intact(2))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", *((65_500, 65_500) if rng.integers(2) else (7_000, 7_500)))
    return bytes(jpeg)


def large(rng: np.random.Generator) -> bytes:
    """Return an intact image of 49 million pixels, close to what is still decoded."""
    return png_of_zeros(7_000, 7_000, 7_000) if rng.integers(2) else _large_jpeg()


def unusual(rng: np.random.Generator) -> bytes:
    """Return an intact image of a kind that many decoders have trouble with."""
    image = photo(int(rng.integers(8)), 120, 90)
    frames = [image.rotate(angle) for angle in (90, 180)]
    rotated = Image.Exif()
    rotated[0x0112] = 6
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    makers: list[Callable[[], bytes]] = [
        lambda: encode(image.convert("CMYK")),
        lambda: encode(image.convert("L")),
        lambda: encode(image, exif=rotated),
        lambda: encode(image, keep_rgb=True),
        lambda: encode(deep, "PNG"),
        lambda: encode(image.convert("RGBA"), "PNG"),
        lambda: encode(image.convert("P"), "PNG", transparency=3),
        lambda: encode(image.convert("1"), "PNG"),
        lambda: encode(image, "PNG", save_all=True, append_images=frames),
        lambda: encode(image, "GIF", save_all=True, append_images=frames),
        lambda: encode(image, "WEBP", save_all=True, append_images=frames),
        lambda: encode(image, "AVIF"),
        lambda: encode(image, "JPEG2000"),
        lambda: encode(image, "TIFF", compression="tiff_lzw"),
        lambda: encode(image, "BMP"),
        lambda: encode(image.resize((1, 1)), "PNG"),
        lambda: encode(image.resize((3000, 2))),
        lambda: encode(image) + rng.bytes(1000),
    ]
    return makers[rng.integers(len(makers))]()


KINDS = {
    "cut": Kind(cut, False, 3),
    "flipped bits": Kind(flip, None, 3),
    "overwritten": Kind(overwrite, None, 2),
    "no image": Kind(garbage, False, 2),
    "bomb": Kind(bomb, False, 0.5),
    "large": Kind(large, True, 0.01),
    "unusual": Kind(unusual, True, 3),
}
"""All kinds, by name."""


@functools.cache
def _large_jpeg() -> bytes:
    return encode(Image.new("RGB", (7_000, 7_000), (90, 120, 30)), quality=75)


@functools.cache
def _many_scans() -> bytes:
    """Return a progressive JPEG that refines the same coefficients 3,000 times."""
    data = intact(len(SIDES))  # the smallest of the second format
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 3000 + data[-2:]
