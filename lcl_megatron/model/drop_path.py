"""Stochastic depth without random-number state.

Every image has a number for every (seed, step, layer, branch): a hash of these and of the image's key. There is no
generator to save, and a recomputed forward pass and every tensor-parallel rank get the same numbers.

- ``mask``: an image skips a branch if its number is below the layer's rate. The decision is the image's own, and so
  the same in every parallel layout. Reference: Huang et al., "Deep Networks with Stochastic Depth" (arXiv:1603.09382).
- ``subset``: of the N images of a micro-batch, those with the M = round((1 - rate) N) largest numbers keep a branch,
  which is computed for them alone. Every image is kept with probability M / N and scaled by N / M, so that the mean is
  that of no drop-path. M depends on N only: shapes are known without waiting for the device. But which images are
  kept depends on the others of the micro-batch: another micro-batch size, or number of data- or context-parallel ranks,
  trains a little differently, as another seed would. With few images M is coarse: below N = 1 / (2 rate) nothing is
  dropped.
  Reference: Oquab et al., "DINOv2" (arXiv:2304.07193), section 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lcl_megatron.model.drop_rates import layer_rate, num_kept

_MASK_64 = (1 << 64) - 1


def _signed(value: int) -> int:
    """Reinterpret an unsigned 64-bit integer as torch's signed one."""
    value &= _MASK_64
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, where multiplication wraps as it does in C (Steele et al., OOPSLA 2014)."""
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own shift of int64 copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keyed_hash(keys: Tensor, *context: int) -> Tensor:
    """Return 64 random bits per key, a pure function of the key and the context.

    Args:
        keys: (N,) int64.
        context: integers that name the decision, e.g. seed, step and layer.

    Returns:
        (N,) int64 on the device of ``keys``.
    """
    x = keys
    for value in context:
        x = _mix(x + _signed((value + 1) * 0x9E3779B97F4A7C15))
    return x


def keyed_uniform(keys: Tensor, *context: int) -> Tensor:
    """Return a uniform number in [0, 1) per key, (N,) float32: the upper 24 bits of ``keyed_hash``."""
    return _shift_right(keyed_hash(keys, *context), 40).to(torch.float32) / float(1 << 24)


@dataclass(frozen=True)
class DropPath:
    """The stochastic depth of one training step."""

    rate: float
    """Drop rate of the last layer; layer i of n has ``rate * i / (n - 1)``."""
    num_layers: int
    """Number of layers n."""
    seed: int
    """Seed of the run."""
    step: int
    """Optimizer step."""

    def keep(self, image_keys: Tensor, layer: int, branch: int) -> Tensor | None:
        """Return what each image's residual branch is multiplied by: 0 or 1 / (1 - rate).

        Args:
            image_keys: (N,) int64.
            layer: layer index from 0.
            branch: 0 = attention, 1 = MLP.

        Returns:
            (N,) float32, or None when the layer's rate is 0.
        """
        rate = layer_rate(self.rate, layer, self.num_layers)
        if rate == 0.0:
            return None
        kept = keyed_uniform(image_keys, self.seed, self.step, 2 * layer + branch) >= rate
        return kept.to(torch.float32) / (1.0 - rate)

    def num_kept(self, num_images: int, layer: int) -> int:
        """Return M, how many of N images keep a branch of a layer in mode ``subset``; at least 1."""
        return num_kept(layer_rate(self.rate, layer, self.num_layers), num_images)

    def subset(self, image_keys: Tensor, layer: int, branch: int) -> Tensor | None:
        """Return which images of a micro-batch keep a residual branch.

        Args:
            image_keys: (N,) int64. The choice depends on the keys, not on their order, unless two are equal.
            layer: layer index from 0.
            branch: 0 = attention, 1 = MLP.

        Returns:
            (M,) int64 places in ``image_keys``, ascending; None when all are kept.
        """
        kept = self.num_kept(image_keys.shape[0], layer)
        if kept == image_keys.shape[0]:
            return None
        # One bit fewer, so that signed integers are in the order of ``keyed_uniform``.
        numbers = _shift_right(keyed_hash(image_keys, self.seed, self.step, 2 * layer + branch), 1)
        return numbers.argsort(descending=True, stable=True)[:kept].sort().values
