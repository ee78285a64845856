"""Parts of the model that a pipeline stage may or may not hold, and marks that megatron-core reads on parameters."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

T = TypeVar("T")


def present(part: T | None) -> T:
    """Return a part that this stage must hold, or an activation that must have arrived.

    Raises:
        AssertionError: it is absent: the line of pieces was walked in the wrong order.
    """
    assert part is not None, "a pipeline stage used a part of the model, or an activation, that it does not hold"
    return part


def mark(parameter: nn.Parameter, **marks: bool) -> None:
    """Set attributes that megatron-core looks for on a parameter.

    ``sequence_parallel``: its gradient is summed over the tensor-parallel ranks, each of which saw a part of the
    sequence. ``shared``: a further copy of a parameter, left out of the gradient norm. ``shared_embedding``: one of two
    copies on different stages; megatron-core then splits both alike over dp, so that their slices of the gradient can
    be summed.
    """
    for name, value in marks.items():
        setattr(parameter, name, value)
