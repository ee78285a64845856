"""What of an image a vision-language model sees: the encoder's own transform, or the whole image in a square."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lcl_megatron.data.decoding.images import decode_rgb
from lcl_megatron.evaluation.encoders.preprocessing import RESAMPLING, Preprocessing

ImageFit = Literal["pad", "crop"]
"""``crop``: the encoder's evaluation transform, which may cut off sides. ``pad``: a square around the whole image."""


def fit_image(data: bytes, preprocessing: Preprocessing, how: ImageFit) -> Tensor:
    """Return what the encoder reads of an image, (3, size, size) uint8 RGB.

    ``pad`` is LLaVA-1.5's: the image stands in the middle of a square of the encoder's mean colour, which becomes
    as large as the encoder reads it.

    Raises:
        ImageError: the image cannot be decoded or is too large.
    """
    if how == "crop":
        return preprocessing(data)
    pixels = decode_rgb(data)
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = [int(255 * value) for value in preprocessing.mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    image = Image.fromarray(square)
    if side != preprocessing.size:
        image = image.resize((preprocessing.size, preprocessing.size), RESAMPLING[preprocessing.interpolation])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
