"""Feature extraction.

Oracle: the same encoder applied to all images at once.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lcl_megatron.evaluation.features import extract_features


def make_images(count: int) -> Tensor:
    return torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_encoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5).to(dtype))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_features_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    images, encoder = make_images(7), make_encoder()
    features = extract_features(lambda pixels: encoder(pixels.float() / 255), images, batch_size)
    torch.testing.assert_close(features, encoder(images.float() / 255).detach())
    assert features.dtype == torch.float32


def test_features_of_a_bf16_encoder_are_float32_and_usable_for_training() -> None:
    images, encoder = make_images(4), make_encoder(torch.bfloat16)
    features = extract_features(lambda pixels: encoder(pixels.to(torch.bfloat16) / 255), images, 2)
    assert features.dtype == torch.float32
    weight = torch.ones(5, requires_grad=True)
    (features @ weight).sum().backward()  # an inference tensor would raise here
    torch.testing.assert_close(weight.grad, features.sum(dim=0))


class CountingSource:
    """Images made on request; remembers which slices were asked for."""

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.requests: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: slice, /) -> Tensor:
        self.requests.append((index.start, index.stop))
        return self._images[index]


def test_images_are_requested_one_batch_at_a_time() -> None:
    source = CountingSource(make_images(5))
    extract_features(lambda pixels: pixels.flatten(1).float(), source, 2)
    assert source.requests == [(0, 2), (2, 4), (4, 6)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda pixels: pixels.float(), r"returned \(2, 3, 8, 8\)"),
        (lambda pixels: pixels.flatten(1)[:1].float(), r"for 2 images"),
        (lambda pixels: pixels.flatten(1), "uint8"),
    ],
)
def test_wrong_output_of_an_encoder_is_refused(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_features(wrong, make_images(2), 2)  # type: ignore[arg-type]


def test_feature_that_is_not_finite_is_named_by_its_image() -> None:
    images = make_images(5)
    images[3] = 0

    def encode(pixels: Tensor) -> Tensor:
        return 1 / pixels.float().flatten(1).sum(dim=1, keepdim=True)

    with pytest.raises(ValueError, match="image 3 is not finite"):
        extract_features(encode, images, 2)


def test_no_images_and_an_impossible_batch_size_are_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        extract_features(lambda pixels: pixels.flatten(1).float(), make_images(0), 2)
    with pytest.raises(ValueError, match="batch_size = 0"):
        extract_features(lambda pixels: pixels.flatten(1).float(), make_images(1), 0)
