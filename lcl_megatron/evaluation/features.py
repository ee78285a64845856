"""Images in, feature vectors out: the one thing every evaluation of a frozen encoder starts with.

An encoder is a callable, so that a checkpoint of this project, an exported folder, an untrained network and any
other library's model are evaluated by the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Encode = Callable[[Tensor], Tensor]
"""Pixels (N, 3, size, size) uint8 RGB on the CPU -> features (N, F), any float dtype, on any device."""


class ImageSource(Protocol):
    """A sequence of images that is read in slices: a uint8 tensor, or files that are decoded when asked for."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: slice, /) -> Tensor:
        """Return pixels (n, 3, size, size) uint8 RGB of the images of a slice."""
        ...


@torch.no_grad()
def extract_features(encode: Encode, images: ImageSource, batch_size: int = 64) -> Tensor:
    """Return the features of every image, in order.

    Only one batch of pixels exists at a time. The encoder must be in evaluation mode (no drop-path, no random crop):
    a feature must depend on nothing but its image.

    Args:
        encode: frozen encoder, see ``Encode``; it normalises the pixels and moves them to its device.
        images: N images.
        batch_size: images per call of ``encode``; the last call may get fewer.

    Returns:
        (N, F) float32 on the CPU.

    Raises:
        ValueError: there is no image, the encoder returns something else than (n, F) floats for n images, or a
            feature is not finite, which would silently put its image in an arbitrary class.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}; at least 1 is needed")
    if len(images) == 0:
        raise ValueError("there are no images to encode; check the split and the image folder")
    batches = []
    for begin in range(0, len(images), batch_size):
        pixels = images[begin : begin + batch_size]
        features = encode(pixels)
        if features.ndim != 2 or len(features) != len(pixels) or not features.is_floating_point():
            raise ValueError(
                f"the encoder returned {tuple(features.shape)} {features.dtype} for {len(pixels)} images; "
                f"expected ({len(pixels)}, F) of a float dtype"
            )
        features = features.to("cpu", torch.float32)
        finite = torch.isfinite(features).all(dim=1)
        if not bool(finite.all()):
            first = begin + int((~finite).nonzero()[0])
            raise ValueError(f"the feature of image {first} is not finite; the weights are damaged or overflow")
        batches.append(features)
    return torch.cat(batches)
