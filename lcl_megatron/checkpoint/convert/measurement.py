"""How far something converted is from what it should be: outputs of two implementations, or weights there and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

OUTPUT_TOLERANCE = 1e-5
"""Largest difference of outputs in float32 that passes, as a share of the largest output, or absolute below 1."""


@dataclass(frozen=True)
class Measurement:
    """How far outputs or weights are from what they should be."""

    loaded_as: str
    """What computed one side of the outputs: a library, or the class of it that was built; empty for weights."""
    max_abs_difference: float
    """Over all values compared."""
    largest_output: float
    """Largest absolute value that was expected of outputs, by which the difference is judged; 0 for weights."""
    missing_keys: tuple[str, ...] = ()
    """Parameters of the class that the file does not have, so that they stayed random."""
    unexpected_keys: tuple[str, ...] = ()
    """Tensors of the file that the class has no place for."""
    tolerance: float = OUTPUT_TOLERANCE
    """Largest difference that passes, as a share of ``largest_output``, or absolute where that is below 1; 0 = the same
    values."""

    @classmethod
    def of_outputs(
        cls,
        loaded_as: str,
        found: Tensor,
        expected: Tensor,
        missing_keys: tuple[str, ...] = (),
        unexpected_keys: tuple[str, ...] = (),
    ) -> Measurement:
        """Compare outputs of any one shape; those of different shapes are infinitely far apart."""
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        return cls(loaded_as, difference, float(expected.abs().max()), missing_keys, unexpected_keys)

    @classmethod
    def of_weights(cls, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Measurement:
        """Compare weights, which must be the same; see ``largest_difference``."""
        return cls("", largest_difference(found, expected), 0.0, tolerance=0.0)

    @property
    def limit(self) -> float:
        """Largest difference that passes."""
        return self.tolerance * max(1.0, self.largest_output)

    @property
    def passed(self) -> bool:
        """Whether every tensor was loaded and the values agree; NaN and infinite ones do not, whatever the limit."""
        # A NaN is within nothing, and in the limit it would hide behind the 1 that max compares it with.
        within = math.isfinite(self.largest_output) and self.max_abs_difference <= self.limit
        return within and not self.missing_keys and not self.unexpected_keys


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference between tensors of the same names.

    Infinity if names or shapes differ, or a value is NaN, even in both.
    """
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in found):
        return float("inf")
    differences = (float((found[name].float() - expected[name].float()).abs().max()) for name in found)
    # NaN is larger than nothing, so that another tensor's difference would hide it.
    return max(float("inf") if math.isnan(difference) else difference for difference in differences)
