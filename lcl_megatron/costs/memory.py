"""Memory of one rank: what the model's state takes, and what a step takes beside it.

Exact, and held by a test against a built model: parameters, gradient buffers, optimizer state. Counted from the code's
saved tensors, and held by a test to a few percent: activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.costs.activations import StageActivations
from lcl_megatron.costs.buffers import FLOAT32_BYTES, GRADIENT_BYTES
from lcl_megatron.costs.counts import StepCounts
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


TILE_COPIES = 3
"""Tiles of the similarity matrix that exist at one time: scores, weights, and weights of the other direction."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank needs at the worst moment of a step."""

    state: RankState
    """Parameters, gradients, optimizer."""
    vision_per_micro_batch: float
    """Activations of the vision tower and the pool."""
    language_per_micro_batch: float
    """Activations of the language model and the heads."""
    in_flight: int
    """Micro-batches whose activations exist at one time."""
    features: float
    """Gathered contrastive features, kept until the end of the step for its report, and one tile of similarities."""
    working: float
    """Gradients of one layer, or logits of one chunk."""

    @property
    def activations(self) -> float:
        """Bytes of the activations of all micro-batches in flight."""
        return self.in_flight * (self.vision_per_micro_batch + self.language_per_micro_batch)

    @property
    def total(self) -> float:
        """Sum of all; what the driver, communication buffers and fragmentation take is not in it."""
        return self.state.total + self.activations + self.features + self.working


def rank_memory(traffic: StepTraffic, stage_index: int, counts: StepCounts, recompute: bool = False) -> RankMemory:
    """Return what a rank of a pipeline stage needs.

    Args:
        traffic: the stage, its buffers and scope.
        stage_index: its place in the pipeline; stages in front hold more micro-batches.
        counts: what a step's micro-batches hold.
        recompute: layers keep only their inputs.
    """
    number = len(counts.micro_batches)
    largest = max(counts.micro_batches, key=lambda micro_batch: (micro_batch.images, micro_batch.targets))
    activations = StageActivations(traffic.config, traffic.stage, recompute)
    kept = activations.micro_batch(largest)
    features = 0.0
    if traffic.stage.is_last:
        slots = counts.contrasted_slots(traffic.scope)
        tile = min(max(slots) * traffic.ranks.dp, traffic.config.loss.contrastive_tile_size)
        width = traffic.config.language.hidden_size
        features = FLOAT32_BYTES * (sum(slots) * traffic.ranks.dp * 2 * width + TILE_COPIES * max(slots) * tile)
    return RankMemory(
        state=rank_state(traffic),
        vision_per_micro_batch=kept["vision"],
        language_per_micro_batch=kept["language"] + kept["heads"],
        in_flight=min(traffic.ranks.pp - stage_index, number),
        features=features,
        working=activations.working_bytes(largest),
    )
