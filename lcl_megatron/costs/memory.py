"""Memory of one rank: what the model's state takes, and what a step takes beside it.

Exact, and held by a test against a built model: parameters, gradient buffers, optimizer state. Counted from the code's
saved tensors, and held by a test to a few percent: activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.costs.buffers import FLOAT32_BYTES, GRADIENT_BYTES
from lcl_megatron.costs.traffic import StepTraffic

MOMENTS = 2
"""Float32 values that Adam keeps per parameter."""


@dataclass(frozen=True)
class RankState:
    """Bytes that stay from step to step."""

    parameters: int
    """Parameters, with the padding of their buffer."""
    gradients: int
    """Gradient buffer, float32."""
    optimizer: int
    """Moments, and a float32 copy of parameters that are not in float32 themselves; this rank's share of them."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.parameters + self.gradients + self.optimizer


def rank_state(traffic: StepTraffic, dp_rank: int = 0) -> RankState:
    """Return what the ranks of a stage keep.

    Args:
        traffic: the stage with its buffers.
        dp_rank: data-parallel rank: shares of the optimizer's state differ by padding.
    """
    is_sharded = traffic.config.parallel.use_distributed_optimizer
    parameters = optimizer = 0
    for buffer in traffic.buffers:
        per_element = FLOAT32_BYTES * (MOMENTS + (buffer.element_bytes != FLOAT32_BYTES))
        if is_sharded:
            owned = sum(bucket.owned(dp_rank, traffic.ranks.dp) for bucket in buffer.buckets)
            parameters += buffer.numel * buffer.element_bytes
        else:
            owned = buffer.num_elements
            parameters += buffer.num_elements * buffer.element_bytes
        optimizer += owned * per_element
    gradients = sum(buffer.numel for buffer in traffic.buffers) * GRADIENT_BYTES
    return RankState(parameters, gradients, optimizer)
