"""The evaluation transform of a stock library, to the same pixels: resize by Pillow, then cut out the centre.

torchvision's ``Resize`` and ``CenterCrop`` on a Pillow image, which timm and open_clip use, and transformers'
``CLIPImageProcessorPil`` are these few lines; their results are equal to the last bit for RGB images. Two things differ
on purpose: any image becomes RGB *before* the resize (Pillow resizes palettes by nearest neighbour), and an image that
is damaged or too large is an error. transformers' default ``CLIPImageProcessor`` resizes tensors instead and differs by
one grey level here and there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcl_megatron.data.decoding.image_probe import ImageError, ImageLimits
from lcl_megatron.data.decoding.images import decode_rgb

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
"""Pillow's filter of each interpolation."""


@dataclass(frozen=True)
class Preprocessing:
    """From the bytes of an image to what an encoder reads."""

    size: int
    """Side of the result, in pixels."""
    resize: int
    """Length of the shorter side before the centre is cut out, in pixels; at least ``size``."""
    mean: tuple[float, float, float]
    """Subtracted from RGB values in [0, 1]."""
    std: tuple[float, float, float]
    """RGB values are divided by it afterwards."""
    interpolation: Interpolation = "bicubic"
    """Filter of the resize; Pillow's, which antialiases."""
    squash: bool = False
    """Resize both sides to ``resize``, whatever the shape of the image."""
    floor_centre: bool = False
    """An odd margin is rounded down (transformers) instead of to the even side (torchvision)."""

    def __call__(self, data: bytes) -> Tensor:
        """Decode, resize and cut out the centre.

        Args:
            data: encoded image.

        Returns:
            (3, size, size) uint8, RGB.

        Raises:
            ImageError: the image cannot be decoded or is too large, also once resized.
        """
        pixels = decode_rgb(data)
        height, width = pixels.shape[:2]
        new_height, new_width = self._resized(height, width)
        if new_height * new_width > ImageLimits.max_pixels:
            raise ImageError(
                f"{width} x {height} pixels become {new_width} x {new_height}, more than {ImageLimits.max_pixels}"
            )
        image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (height, width, 3))))
        if (new_height, new_width) != (height, width):
            image = image.resize((new_width, new_height), RESAMPLING[self.interpolation])
        top, left = self._margin(new_height), self._margin(new_width)
        crop = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return torch.from_numpy(crop.copy()).permute(2, 0, 1).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return (N, 3, S, S) float32 of mean 0 and deviation 1, about, from uint8 pixels, on their device."""
        mean, std = (pixels.new_tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.squash:
            return self.resize, self.resize
        # As torchvision and transformers compute it: the product before the division, rounded down.
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize

    def _margin(self, length: int) -> int:
        return (length - self.size) // 2 if self.floor_centre else round((length - self.size) / 2)
