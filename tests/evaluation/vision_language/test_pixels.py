"""Oracles: LLaVA's ``expand2square`` on a Pillow image, then Pillow's resize; the encoder's own transform."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_megatron.data.decoding.image_probe import ImageError
from lcl_megatron.evaluation.encoders.preprocessing import Preprocessing
from lcl_megatron.evaluation.vision_language.pixels import fit_image

PREPROCESSING = Preprocessing(16, 18, (0.4815, 0.4578, 0.4082), (0.27, 0.26, 0.28))


def encoded(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 41), (16, 16), (16, 10)])
def test_padding_equals_expand2square(width: int, height: int) -> None:
    data = encoded(width, height)
    image = Image.open(io.BytesIO(data))
    side = max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    expected = np.asarray(square if side == 16 else square.resize((16, 16), Image.Resampling.BICUBIC))
    found = fit_image(data, PREPROCESSING, "pad")
    assert found.dtype == torch.uint8
    assert (found.permute(1, 2, 0).numpy() == expected).all()


def test_crop_is_the_encoders_transform() -> None:
    data = encoded(40, 20)
    assert (fit_image(data, PREPROCESSING, "crop") == PREPROCESSING(data)).all()


@pytest.mark.parametrize("how", ["pad", "crop"])
def test_damaged_image(how: str) -> None:
    with pytest.raises(ImageError):
        fit_image(b"<html>", PREPROCESSING, how)  # type: ignore[arg-type]
