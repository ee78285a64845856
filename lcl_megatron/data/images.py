"""Encoded bytes to uint8 pixels: the OpenCLIP transforms, with every random number a hash of the image's key.

The header is read and judged before anything is decoded, so that a small file cannot ask for gigabytes. Decoding is
Pillow's; the resize is ``torch.nn.functional.interpolate`` on uint8 with antialias, which agrees with Pillow's own
resize within 1/255 (2/255 where it enlarges) and is several times as fast. Images become RGB *before* the resize:
Pillow resizes palettes by nearest neighbour and premultiplies alpha, so that OpenCLIP's order gives visibly other
pixels for GIF and RGBA files. EXIF orientation is ignored, as in OpenCLIP.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.order import Stream, keyed_uniforms

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What is decoded, by Pillow's names. Pillow's other decoders are rarely used, hence rarely attacked."""
CROP_TRIES = 10
"""Random crops tried before the central one is taken (torchvision)."""


class ImageError(ValueError):
    """An image that cannot be shown to the model; the message says why, without the source."""


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TrainingTransform:
    """RandomResizedCrop of OpenCLIP, a pure function of bytes and key."""

    size: int
    """Side of the result, in pixels."""
    seed: int
    """Seed of the run."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Area of the crop, as a share of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the crop."""
    max_pixels: int = 64_000_000
    """Images with more pixels are not decoded."""

    def __call__(self, data: bytes, key: int) -> Tensor:
        """Decode, crop and resize.

        Args:
            data: Encoded image.
            key: Image key, which stands for image and epoch.

        Returns:
            (3, size, size) uint8, RGB.

        Raises:
            ImageError: If the image cannot be decoded or is too large.
        """
        pixels = decode_rgb(data, self.max_pixels)
        box = self.box(key, *pixels.shape[:2])
        cropped = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
        return resize(cropped, self.size, self.size)

    def box(self, key: int, height: int, width: int) -> Box:
        """Return the crop of an image of some size, as torchvision's ``RandomResizedCrop.get_params`` draws it."""
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for attempt in range(CROP_TRIES):
            u_area, u_ratio, u_top, u_left = keyed_uniforms(4, self.seed, Stream.CROP, key, attempt)
            area = height * width * (self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * u_area)
            ratio = math.exp(low + (high - low) * u_ratio)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w)
        h, w = height, width
        if width / height < self.crop_ratio[0]:
            h = round(width / self.crop_ratio[0])
        elif width / height > self.crop_ratio[1]:
            w = round(height * self.crop_ratio[1])
        return Box((height - h) // 2, (width - w) // 2, h, w)


def evaluation_image(data: bytes, size: int, max_pixels: int = 64_000_000) -> Tensor:
    """Decode, resize the shorter side to ``size`` and cut out the centre (OpenCLIP's evaluation transform).

    Args:
        data: Encoded image.
        size: Side of the result, in pixels.
        max_pixels: Images with more pixels are not decoded.

    Returns:
        (3, size, size) uint8, RGB.

    Raises:
        ImageError: If the image cannot be decoded or is too large, also once resized.
    """
    pixels = decode_rgb(data, max_pixels)
    height, width = pixels.shape[:2]
    short = min(height, width)
    new_height, new_width = size * height // short, size * width // short
    if new_height * new_width > max_pixels:
        raise ImageError(f"{width} x {height} pixels become {new_width} x {new_height}, more than {max_pixels}")
    resized = resize(pixels, new_height, new_width)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized[:, top : top + size, left : left + size].contiguous()


def decode_rgb(data: bytes, max_pixels: int) -> np.ndarray:
    """Decode an image after a look at its header.

    Args:
        data: Encoded image.
        max_pixels: Images with more pixels are not decoded.

    Returns:
        (height, width, 3) uint8. An animation gives its first frame, 16-bit grey its upper 8 bits (rounded).

    Raises:
        ImageError: If it cannot be decoded completely, or is larger than ``max_pixels``.
    """
    if not data:
        raise ImageError("no bytes")
    try:
        with warnings.catch_warnings():
            # Pillow refuses 179 million pixels, and warns from half as many on, of which max_pixels is the judge.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels, more than {max_pixels}")
            if width * height == 0:
                raise ImageError(f"{width} x {height} pixels")
            return _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"no image of a known format: {len(data)} bytes that begin with {data[:12]!r}") from error
    except Exception as error:  # decoders of broken bytes raise almost anything: OSError, SyntaxError, struct.error
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def resize(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """Resize (h, w, 3) uint8 pixels by antialiased bicubic interpolation to (3, height, width) uint8."""
    # A copy: torch cannot hold read-only memory, and its fast path wants the crop's channels side by side.
    image = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)[None]
    resized = functional.interpolate(image, size=(height, width), mode="bicubic", antialias=True)
    return resized[0].contiguous()


def blank_image(size: int) -> Tensor:
    """Return (3, size, size) uint8 of the mean colour: the filling of slots without a good image."""
    return torch.tensor(BLANK_PIXEL, dtype=torch.uint8)[:, None, None].expand(3, size, size).contiguous()


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Decode all pixels. Pillow's own conversion of 16-bit grey clips it to 255 instead of scaling it."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ImageError(f"pixel format {image.mode!r} has no white: the range of its values is unknown")
    return np.array(image.convert("RGB"))
