"""Encoded bytes to uint8 pixels: the OpenCLIP transforms, with every random number a hash of the image's key.

JPEG is decoded by libjpeg-turbo (simplejpeg), to the same pixels as Pillow does; what it finds fault with, and all
other formats, is Pillow's. The resize is torch's on uint8 with antialias, which agrees with Pillow's own resize within
1/255 (2/255 where it enlarges) and is several times as fast. Images become RGB *before* the resize: Pillow resizes
palettes by nearest neighbour and premultiplies alpha, so that OpenCLIP's order gives visibly other pixels for GIF and
RGBA files. EXIF orientation is ignored, as in OpenCLIP.

Nothing here uses torch's threads, so that many threads can decode at once without a second crowd of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.decoding.image_probe import ImageError, ImageHeader, ImageLimits, open_image, read_header
from lcl_megatron.data.order import Stream, keyed_hash, keyed_uniforms

CROP_TRIES = 10
"""Random crops tried before the central one is taken (torchvision)."""
BAND_PIXELS = 1 << 18
"""Pixels of Pillow's that are converted at once; a large image is then never there twice in full."""


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
    max_pixels: int = ImageLimits.max_pixels
    """Images with more pixels are not decoded."""
    max_memory: int = ImageLimits.max_memory
    """Images that would take more bytes to decode are not decoded."""

    @property
    def limits(self) -> ImageLimits:
        """What an image may ask for."""
        return ImageLimits(self.max_pixels, self.max_memory)

    def __call__(self, data: bytes, key: int) -> Tensor:
        """Decode, crop and resize.

        Args:
            data: Encoded image.
            key: Image key, which stands for image and epoch.

        Returns:
            (3, size, size) uint8, RGB, channels last in memory.

        Raises:
            ImageError: If the image cannot be decoded or is too large.
        """
        (pixels,) = empty_images(1, self.size)
        header = read_header(data, self.limits)
        resize_into(pixels, decode_crop(data, header, self.box(key, header.height, header.width)))
        return pixels

    def draw(self, keys: Sequence[int]) -> list[list[float]]:
        """Return the random numbers of the first try of ``box`` for many keys, which is cheaper than one by one."""
        hashes = keyed_hash(self.seed, Stream.CROP, np.array(keys, dtype=np.int64)[:, None], 0, np.arange(4))
        return ((hashes >> np.uint64(11)) / (1 << 53)).tolist()

    def box(self, key: int, height: int, width: int, first_draw: Sequence[float] | None = None) -> Box:
        """Return the crop of an image of some size, as torchvision's ``RandomResizedCrop.get_params`` draws it.

        Args:
            key: Image key.
            height: Of the image, in pixels.
            width: Of the image, in pixels.
            first_draw: What ``draw`` returned for the key, if it was asked.
        """
        low, high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        for attempt in range(CROP_TRIES):
            draw = first_draw if attempt == 0 else None
            u_area, u_ratio, u_top, u_left = draw or keyed_uniforms(4, self.seed, Stream.CROP, key, attempt)
            area = height * width * (self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * u_area)
            ratio = math.exp(low + (high - low) * u_ratio)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return Box(int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w)
        h, w = height, width
        if width / height < self.crop_ratio[0]:
            h = max(1, round(width / self.crop_ratio[0]))
        elif width / height > self.crop_ratio[1]:
            w = max(1, round(height * self.crop_ratio[1]))
        return Box((height - h) // 2, (width - w) // 2, h, w)


def evaluation_image(data: bytes, size: int, max_pixels: int = ImageLimits.max_pixels) -> Tensor:
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


def decode_rgb(data: bytes, max_pixels: int = ImageLimits.max_pixels) -> np.ndarray:
    """Decode an image after a look at its header.

    Args:
        data: Encoded image.
        max_pixels: Images with more pixels are not decoded.

    Returns:
        (height, width, 3) uint8. An animation gives its first frame, 16-bit grey its upper 8 bits (rounded).

    Raises:
        ImageError: If it cannot be decoded completely, or asks for too much.
    """
    header = read_header(data, ImageLimits(max_pixels))
    return decode_crop(data, header, Box(0, 0, header.height, header.width))


def decode_crop(data: bytes, header: ImageHeader, box: Box) -> np.ndarray:
    """Decode a part of an image, (box.height, box.width, 3) uint8, contiguous.

    The whole image is decoded: pixels near a border of the box do not depend on where it is.

    Raises:
        ImageError: If any part of the image cannot be decoded.
    """
    try:
        if header.plain_jpeg:
            try:
                whole = simplejpeg.decode_jpeg(data)
            except ValueError:  # also for what libjpeg only warns of; Pillow decides how bad it is
                pass
            else:
                bottom, right = box.top + box.height, box.left + box.width
                return np.ascontiguousarray(whole[box.top : bottom, box.left : right])
        with open_image(data) as image:
            if image.size != (header.width, header.height):
                raise ImageError(f"headers of {header.width} x {header.height} and of {image.width} x {image.height}")
            return _crop(image, box)
    except ImageError:
        raise
    except Exception as error:  # decoders of broken bytes raise almost anything: OSError, SyntaxError, struct.error
        raise ImageError(f"cannot be decoded: {type(error).__name__}: {error}") from error


def resize_into(resized: Tensor, pixels: np.ndarray) -> None:
    """Resize by antialiased bicubic interpolation.

    Args:
        resized: (3, height, width) uint8, channels last in memory; is overwritten.
        pixels: (h, w, 3) uint8, contiguous.
    """
    # What functional.interpolate(mode="bicubic", antialias=True) calls. It has no ``out``, and what it returns is
    # channels first, which takes the kernel as long as the resize itself.
    operator = torch.ops.aten._upsample_bicubic2d_aa.out
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    operator(source, list(resized.shape[1:]), False, None, None, out=resized[None])


def resize(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """Resize (h, w, 3) uint8 pixels by antialiased bicubic interpolation to (3, height, width) uint8."""
    resized = torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    # A copy where needed: torch cannot hold read-only memory.
    resize_into(resized, np.require(pixels, requirements=("C", "W")))
    return resized


def empty_images(count: int, size: int, pin: bool = False) -> Tensor:
    """Return (count, 3, size, size) uint8 of any content, channels last in memory.

    Args:
        count: Number of images.
        size: Their side.
        pin: Whether in page-locked memory, from which a GPU copies on its own.
    """
    return torch.empty(count, size, size, 3, dtype=torch.uint8, pin_memory=pin).permute(0, 3, 1, 2)


def blank_image(size: int) -> Tensor:
    """Return (3, size, size) uint8 of the mean colour: the filling of slots without a good image."""
    return torch.tensor(BLANK_PIXEL, dtype=torch.uint8)[:, None, None].expand(3, size, size).contiguous()


def _crop(image: Image.Image, box: Box) -> np.ndarray:
    pixels = np.empty((box.height, box.width, 3), dtype=np.uint8)
    rows = max(1, BAND_PIXELS // box.width)
    for begin in range(0, box.height, rows):
        end = min(begin + rows, box.height)
        band = image.crop((box.left, box.top + begin, box.left + box.width, box.top + end))
        pixels[begin:end] = _to_rgb(band)
    return pixels


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Return what broadcasts to RGB. Pillow's own conversion of 16-bit grey clips it to 255 instead of scaling it."""
    if image.mode.startswith("I;16"):
        return ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)[:, :, None]
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
