"""Stochastic depth without random-number state.

Whether an image skips a residual branch is a hash of (seed, step, image key, layer, branch). So the decision is the
same in a recomputed forward pass, on every tensor-parallel rank, and in every parallel layout; and there is no
generator to save. Reference: Huang et al., "Deep Networks with Stochastic Depth" (arXiv:1603.09382).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def keyed_uniform(keys: Tensor, *context: int) -> Tensor:
    """Return a uniform number in [0, 1) per key, a pure function of the key and the context.

    Args:
        keys: (N,) int64.
        context: integers that name the decision, e.g. seed, step and layer.

    Returns:
        (N,) float32 on the device of ``keys``.
    """
    x = keys
    for value in context:
        x = _mix(x + _signed((value + 1) * 0x9E3779B97F4A7C15))
    return _shift_right(x, 40).to(torch.float32) / float(1 << 24)


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
        rate = self.rate * layer / max(1, self.num_layers - 1)
        if rate == 0.0:
            return None
        kept = keyed_uniform(image_keys, self.seed, self.step, 2 * layer + branch) >= rate
        return kept.to(torch.float32) / (1.0 - rate)
