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


def rank_state(traffic: StepTraffic, replica: int = 0) -> RankState:
    """Return what the ranks of a stage keep.

    Args:
        traffic: the stage with its buffers.
        replica: rank among those that hold the same parameters: shares of the optimizer's state differ by padding.
    """
    is_sharded = traffic.config.parallel.use_distributed_optimizer
    parameters = optimizer = 0
    for buffer in traffic.buffers:
        per_element = FLOAT32_BYTES * (MOMENTS + (buffer.element_bytes != FLOAT32_BYTES))
        if is_sharded:
            owned = sum(bucket.owned(replica, traffic.ranks.replicas) for bucket in buffer.buckets)
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


def rank_memory(traffic: StepTraffic, stage_index: int, counts: StepCounts) -> RankMemory:
    """Return what a rank of a pipeline stage needs.

    Args:
        traffic: the stage and its buffers.
        stage_index: its place in the pipeline; stages in front hold more micro-batches.
        counts: what a step's micro-batches hold.
    """
    config, number = traffic.config, len(counts.micro_batches)
    largest = max(counts.micro_batches, key=lambda micro_batch: (micro_batch.images, micro_batch.targets))
    activations = StageActivations(config, traffic.stage, traffic.cp_rank)
    kept = activations.micro_batch(largest)
    keeps_all = counts.contrasts_all(config.loss) and config.loss.contrastive_keep_graphs
    return RankMemory(
        state=rank_state(traffic),
        vision_per_micro_batch=kept["vision"],
        language_per_micro_batch=kept["language"] + kept["heads"],
        in_flight=number if keeps_all else min(traffic.ranks.pp - stage_index, number),
        features=_features(traffic, counts) if traffic.stage.is_last else 0.0,
        working=activations.working_bytes(largest),
    )


def _features(traffic: StepTraffic, counts: StepCounts) -> float:
    """Return the bytes of features on the last stage: all ranks', a tile of similarities, and of two passes its own."""
    config = traffic.config
    slots = counts.contrasted_slots(config.loss)
    tile = min(max(slots) * traffic.ranks.dp, config.loss.contrastive_tile_size)
    width = 2 * config.language.hidden_size
    size = FLOAT32_BYTES * (sum(slots) * traffic.ranks.dp * width + TILE_COPIES * max(slots) * tile)
    # Features of the first pass, and the gradients that the second one is given.
    own = 2 * counts.most_slots * width * traffic.element_bytes
    return float(size + (own if counts.passes_twice(config.loss) else 0))
