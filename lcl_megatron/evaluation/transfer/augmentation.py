"""What happens to a training image in full transfer: a random crop and a flip, decided by the example's key."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lcl_megatron.data.decoding.images import TrainingTransform
from lcl_megatron.data.order import keyed_uniforms
from lcl_megatron.evaluation.transfer.streams import TransferStream


@dataclass(frozen=True)
class CropAndFlip:
    """RandomResizedCrop and a horizontal flip, a pure function of bytes and key."""

    size: int
    """Side of the result, in pixels."""
    seed: int
    """Of crops and flips."""
    crop_scale: tuple[float, float]
    """Area of the crop, as a share of the image."""
    flip: bool
    """Whether half of the images are mirrored."""

    def __call__(self, data: bytes, key: int) -> Tensor:
        """Return (3, size, size) uint8 RGB; raises ``ImageError``."""
        pixels = TrainingTransform(self.size, self.seed, self.crop_scale)(data, key)
        is_flipped = self.flip and keyed_uniforms(1, self.seed, TransferStream.FLIP, key)[0] < 0.5
        return pixels.flip(2) if is_flipped else pixels
