"""What the first bytes of an image say, and whether to decode it at all: a small file can ask for gigabytes or hours.

JPEG is read by libjpeg-turbo, which takes 3 us; everything else by Pillow, which takes 30.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import simplejpeg
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded, by Pillow's names. Pillow's other decoders are rarely used, hence rarely attacked."""
MAX_SCANS = 200
"""Scans of a JPEG. Progressive ones have about 10; thousands of empty ones would take minutes to decode."""
BYTES_PER_PIXEL = {"WEBP": 24, "AVIF": 24, "JPEG2000": 40, "TIFF": 12, "GIF": 12}
"""Peak memory of decoding and cropping, from above; the decoders keep several copies of the frame."""
BYTES_PER_PIXEL_OTHERWISE = 7
"""4 in Pillow's image and 3 in the crop."""
BYTES_PER_PIXEL_OF_COEFFICIENTS = 6
"""A JPEG of several scans keeps the coefficients of the whole image, 2 bytes for each of 3 channels."""
JPEG_START = b"\xff\xd8\xff"
JPEG_COLORS = ("RGB", "YCbCr", "Gray")
"""Colour spaces that simplejpeg turns into the same RGB as Pillow."""

# Pillow warns of large and of slightly wrong images; here limits judge the one and errors the other. Once for all
# threads: warnings.catch_warnings is not safe among several.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Pillow's decoders by now: the first Image.open of an unusual format would load them in the middle of a run.
Image.init()


class ImageError(ValueError):
    """An image that cannot be shown to the model; the message says why, without the source."""


@dataclass(frozen=True)
class ImageLimits:
    """What an image may ask for."""

    max_pixels: int = 64_000_000
    """Images with more pixels are not decoded."""
    max_memory: int = 350_000_000
    """Images that would take more bytes to decode are not decoded."""


@dataclass(frozen=True)
class ImageHeader:
    """What is known of an image before it is decoded."""

    format: str
    """Pillow's name of the format."""
    mode: str
    """Pillow's name of the pixel format as stored; ``RGB`` for every JPEG that is ``plain_jpeg``."""
    width: int
    """In pixels, at least 1."""
    height: int
    """In pixels, at least 1."""
    memory: int
    """Bytes that decoding takes at its peak, from above."""
    plain_jpeg: bool
    """Whether it is a JPEG of RGB, YCbCr or grey pixels."""


def read_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Read the header of an image; decodes no pixel.

    Raises:
        ImageError: If it is no image, or asks for more than ``limits``.
    """
    header = parse_header(data)
    width, height = header.width, header.height
    if width * height > limits.max_pixels:
        raise ImageError(f"{width} x {height} pixels, more than {limits.max_pixels}")
    if width * height == 0:
        raise ImageError(f"{width} x {height} pixels")
    if header.memory > limits.max_memory:
        raise ImageError(
            f"{width} x {height} pixels of {header.format} take {header.memory / 1e6:.0f} MB to decode, more than "
            f"{limits.max_memory / 1e6:.0f}"
        )
    if header.mode in ("I", "F"):
        raise ImageError(f"pixel format {header.mode!r} has no white: the range of its values is unknown")
    return header


def parse_header(data: bytes) -> ImageHeader:
    """Return what the header of an image says, whatever it asks for; decodes no pixel.

    Raises:
        ImageError: If it is no image, or a JPEG of more than ``MAX_SCANS`` scans.
    """
    if not data:
        raise ImageError("no bytes")
    return _read_jpeg_header(data) or _read_any_header(data)


def open_image(data: bytes) -> Image.Image:
    """Open an image of one of ``FORMATS`` with Pillow; decodes no pixel.

    Raises:
        ImageError: If it is no image.
    """
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ImageError(f"no image of a known format: {len(data)} bytes that begin with {data[:12]!r}") from error
    except Exception as error:  # broken bytes raise almost anything: OSError, SyntaxError, struct.error
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def _read_jpeg_header(data: bytes) -> ImageHeader | None:
    """Return the header of a JPEG that simplejpeg can decode, else None."""
    if not data.startswith(JPEG_START):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if color not in JPEG_COLORS:
        return None
    return ImageHeader("JPEG", "RGB", width, height, _jpeg_memory(data, width * height), plain_jpeg=True)


def _read_any_header(data: bytes) -> ImageHeader:
    with open_image(data) as image:
        width, height = image.size
        # A camera's JPEG that holds further pictures behind the first one.
        name = "JPEG" if image.format == "MPO" else str(image.format)
        if name == "JPEG":
            memory = _jpeg_memory(data, width * height)
        else:
            memory = width * height * BYTES_PER_PIXEL.get(name, BYTES_PER_PIXEL_OTHERWISE)
        return ImageHeader(name, image.mode, width, height, memory, plain_jpeg=False)


def _jpeg_memory(data: bytes, num_pixels: int) -> int:
    """Return what a JPEG takes to decode.

    Raises:
        ImageError: If it has more than ``MAX_SCANS`` scans.
    """
    if not _has_several_scans(data):
        return num_pixels * BYTES_PER_PIXEL_OTHERWISE
    # Inside a scan, FF is followed by 00: what is found are markers, and a few more in embedded thumbnails.
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise ImageError(f"{scans} JPEG scans, more than {MAX_SCANS}")
    return num_pixels * (BYTES_PER_PIXEL_OTHERWISE + BYTES_PER_PIXEL_OF_COEFFICIENTS)


def _has_several_scans(data: bytes) -> bool:
    """Whether a JPEG is progressive, or its first scan lacks components; True where its markers make no sense."""
    position, components = 2, 0
    while position + 9 < len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
        elif marker == 0xDA:
            return data[position + 4] < components
        elif marker in (0xC0, 0xC1):
            components = data[position + 9]
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
        elif marker == 0xC2:
            return True
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return True
