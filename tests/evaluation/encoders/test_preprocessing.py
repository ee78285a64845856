"""The evaluation transform.

Oracles: torchvision's Resize and CenterCrop on a Pillow image, transformers' Pillow image processor.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_megatron.data.decoding.image_probe import ImageError
from lcl_megatron.evaluation.encoders.preprocessing import Preprocessing
from tests.stock import stock_or_skip

MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
SIZES = [(37, 50), (50, 37), (32, 32), (31, 90), (20, 21)]


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng([width, height])
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resize", "squash"), [(32, False), (36, False), (35, True)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_equal_torchvision(size: tuple[int, int], resize: int, squash: bool, interpolation: str) -> None:
    stock_or_skip("timm")  # makes torchvision importable
    transforms = pytest.importorskip("torchvision.transforms")
    mode = transforms.InterpolationMode(interpolation)
    oracle = transforms.Compose(
        [
            transforms.Resize((resize, resize) if squash else resize, interpolation=mode),
            transforms.CenterCrop(32),
            transforms.PILToTensor(),
        ]
    )
    preprocessing = Preprocessing(32, resize, MEAN, STD, interpolation, squash)  # type: ignore[arg-type]
    image = picture(*size)
    pixels = preprocessing(png(image))
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, oracle(image))


@pytest.mark.parametrize("size", SIZES)
def test_normalized_pixels_equal_transformers(size: tuple[int, int]) -> None:
    transformers = stock_or_skip("transformers")
    if not hasattr(transformers, "CLIPImageProcessorPil"):
        pytest.skip("this transformers has no Pillow image processor")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 35}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    )
    image = picture(*size)
    expected = torch.as_tensor(np.asarray(processor(image).pixel_values))
    preprocessing = Preprocessing(32, 35, MEAN, STD, floor_centre=True)
    found = preprocessing.normalize(preprocessing(png(image))[None])
    torch.testing.assert_close(found, expected.reshape(found.shape), rtol=0, atol=1e-6)


def test_grey_and_palette_images_become_rgb() -> None:
    preprocessing = Preprocessing(32, 32, MEAN, STD)
    grey = picture(40, 40).convert("L")
    pixels = preprocessing(png(grey))
    assert torch.equal(pixels[0], pixels[2])
    assert preprocessing(png(picture(40, 40).convert("P"))).shape == (3, 32, 32)


def test_bad_images_are_errors() -> None:
    preprocessing = Preprocessing(32, 32, MEAN, STD)
    with pytest.raises(ImageError):
        preprocessing(b"<html>")
    with pytest.raises(ImageError):
        preprocessing(png(picture(40, 40))[:200])
    with pytest.raises(ImageError, match="4000 x 1 pixels become"):
        Preprocessing(3000, 3000, MEAN, STD)(png(picture(4000, 1)))
