"""Every collective and every transfer of one training step, as one rank takes part in it.

The rules follow the code that communicates, line by line: ``model/`` and megatron-core's tensor-parallel layers (tp),
``parallel/pipeline.py`` (pp), ``parallel/contrastive.py`` (dp), megatron-core's DDP and optimizer (dp, all), and
``parallel/agreement.py`` (host). A test counts what really happens on several ranks, and allows no difference.

A group of one rank moves nothing. The size of a call is that of the whole tensor that its group shares: what is
reduced, what is gathered, what is scattered, what is sent.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lcl_megatron.config import RunConfig
from lcl_megatron.costs.buffers import FLOAT32_BYTES, GRADIENT_BYTES, Buffer, lay_out
from lcl_megatron.costs.counts import MicroBatchCounts, Scope, StepCounts
from lcl_megatron.costs.parameters import stage_parameters
from lcl_megatron.model.line import HEADS, LANGUAGE_EMBED, POOL, VISION_EMBED, Stage, cut_line

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]
Group = Literal["tp", "dp", "pp", "embedding", "model", "all", "host"]
"""``model`` = the ranks of one copy of the model; ``all`` = all ranks; ``host`` = all ranks, between processors."""
Purpose = Literal["activations", "features", "gradients", "parameters", "boundary", "norm", "agreement"]
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a parameter and of an activation."""


@dataclass(frozen=True)
class Transfer:
    """Calls of one kind and size."""

    group: Group
    """Who takes part."""
    kind: Kind
    """What is called."""
    purpose: Purpose
    """What is moved."""
    calls: int
    """Number of calls."""
    call_bytes: int
    """Bytes of the shared tensor of one call."""
    backward: bool = False
    """Whether it belongs to the backward pass."""

    @property
    def bytes(self) -> int:
        """Bytes of all calls."""
        return self.calls * self.call_bytes

    def wire_bytes(self, ranks: int) -> float:
        """Return what each rank sends in all calls, by the ring algorithms of a group of ``ranks``."""
        if self.kind == "send":
            return float(self.bytes)
        rounds = 2 if self.kind == "all_reduce" else 1
        return self.bytes * rounds * (ranks - 1) / ranks


@dataclass(frozen=True)
class Ranks:
    """How many ranks each group has."""

    tp: int
    pp: int
    dp: int

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Ranks:
        """Return the groups of a run on ``world_size`` processes."""
        tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
        return cls(tp, pp, world_size // (tp * pp))

    def size(self, group: Group) -> int:
        """Return the number of ranks of a group."""
        world = self.tp * self.pp * self.dp
        sizes = {"tp": self.tp, "dp": self.dp, "pp": self.pp, "embedding": 2, "model": self.tp * self.pp}
        return sizes.get(group, world)


class StepTraffic:
    """The traffic of a run's steps on the ranks of one pipeline stage.

    Args:
        config: the run, vocabulary size known.
        world_size: number of processes.
        stage_index: pipeline stage.
        scope: which images are contrasted with each other.
    """

    def __init__(self, config: RunConfig, world_size: int, stage_index: int, scope: Scope = "micro_batch") -> None:
        self.config = config
        self.scope = scope
        self.ranks = Ranks.of(config, world_size)
        self.stages = cut_line(config)
        self.stage: Stage = self.stages[stage_index]
        self.element_bytes = ELEMENT_BYTES[config.training.precision]
        self.parameters = stage_parameters(config, self.stage)
        self.buffers: tuple[Buffer, ...] = lay_out(
            self.parameters, config.parallel, self.element_bytes, self.ranks.dp, self.stage.is_first
        )

    def step(self, counts: StepCounts) -> tuple[Transfer, ...]:
        """Return all transfers of one step, those of groups of one rank left out."""
        found: list[Transfer] = []
        passes_twice = self.scope == "global" and len(counts.micro_batches) > 1
        for micro_batch, number in Counter(counts.micro_batches).items():
            once = [*self.micro_batch(micro_batch), *(self.features_pass(micro_batch) if passes_twice else ())]
            found += [dataclasses.replace(transfer, calls=number * transfer.calls) for transfer in once]
        found += self.contrast(counts)
        found += self.once(counts)
        return merged(found, self.ranks)

    def micro_batch(self, counts: MicroBatchCounts) -> list[Transfer]:
        """Return what forward and backward pass of one micro-batch move within a copy of the model."""
        return [*self._tensor_parallel(counts), *self._boundaries(counts)]

    def features_pass(self, counts: MicroBatchCounts) -> list[Transfer]:
        """Return what a forward pass for features alone moves: no token losses, nothing backward."""
        whole = [*self._layers(counts), *self._picked(counts.slots), *self._boundaries(counts)]
        return [transfer for transfer in whole if not transfer.backward]

    def contrast(self, counts: StepCounts) -> list[Transfer]:
        """Return the gathers of features, and of two floats per slot, on the last stage."""
        if not self.stage.is_last:
            return []
        slots = counts.contrasted_slots(self.scope)
        width = 2 * self.config.language.hidden_size
        return [
            Transfer("dp", "all_gather", "features", calls, number * self.ranks.dp * columns * FLOAT32_BYTES)
            for number, calls in Counter(slots).items()
            for columns in (width, 2)
        ]

    def once(self, counts: StepCounts) -> list[Transfer]:
        """Return what moves once per step: gradients, parameters, gradient norm, agreement."""
        parallel = self.config.parallel
        found: list[Transfer] = []
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                size = bucket.numel * GRADIENT_BYTES
                if parallel.use_distributed_optimizer:
                    found.append(Transfer("dp", "reduce_scatter", "gradients", 1, size, backward=True))
                    found.append(Transfer("dp", "all_gather", "parameters", 1, bucket.numel * buffer.element_bytes))
                else:
                    found.append(Transfer("dp", "all_reduce", "gradients", 1, size, backward=True))
        if parallel.sequence_parallel:
            summed = sum(parameter.numel for parameter in self.parameters if parameter.sequence_parallel)
            if summed:
                found.append(Transfer("tp", "all_reduce", "gradients", 1, summed * GRADIENT_BYTES, backward=True))
        found += [
            Transfer("embedding", "all_reduce", "gradients", 1, parameter.numel * GRADIENT_BYTES, backward=True)
            for parameter in self.parameters
            if parameter.shared_embedding
        ]
        group: Group = "all" if parallel.use_distributed_optimizer else "model"
        found.append(Transfer(group, "all_reduce", "norm", 1, FLOAT32_BYTES))
        found.append(Transfer("host", "all_reduce", "agreement", 1, counts.all_images + 1))
        return found

    def _tensor_parallel(self, counts: MicroBatchCounts) -> Iterator[Transfer]:
        yield from self._layers(counts)
        if not self.stage.has(HEADS):
            return
        loss, hidden = self.config.loss, self.config.language.hidden_size
        targets = max(1, counts.targets)
        yield from self._picked(targets)
        yield from self._picked(counts.slots)
        if loss.latent_regression_loss_weight > 0:
            yield from self._picked(counts.slots * self.config.vision.num_patches)
        yield self._all_reduce(targets * hidden, backward=True)
        # Maximum, target's logit and sum of exponentials; the backward pass computes each chunk again.
        full, rest = divmod(targets, loss.cross_entropy_chunk_size)
        for size, number in ((loss.cross_entropy_chunk_size, full), (rest, 1)):
            if size and number:
                for backward in (False, True):
                    yield Transfer("tp", "all_reduce", "activations", 3 * number, size * FLOAT32_BYTES, backward)

    def _picked(self, rows: int) -> Iterator[Transfer]:
        """Rows that their owner shares: only a sequence that is split has owners."""
        if self.stage.has(HEADS) and self.config.parallel.sequence_parallel:
            yield self._all_reduce(rows * self.config.language.hidden_size)

    def _layers(self, counts: MicroBatchCounts) -> Iterator[Transfer]:
        """Layers of both towers, and where sequences are split and joined."""
        config, stage, is_split = self.config, self.stage, self.config.parallel.sequence_parallel
        ways = self.ranks.tp if is_split else 1
        vision = -(-counts.slots * config.vision.num_tokens // ways) * ways * config.vision.hidden_size
        language = config.training.micro_batch_size * config.data.seq_length * config.language.hidden_size
        yield from self._layer(vision, len(stage.layers("vision")))
        yield from self._layer(language, len(stage.layers("language")))
        if stage.has(LANGUAGE_EMBED):
            yield self._all_reduce(language)
        if is_split and stage.has(VISION_EMBED):
            yield self._all_gather(vision, backward=True)
        if is_split and stage.has(POOL):
            yield self._all_gather(vision)
        if is_split and stage.has(LANGUAGE_EMBED):
            yield self._all_gather(language, backward=True)

    def _layer(self, elements: int, layers: int) -> Iterator[Transfer]:
        """Two pairs of products per layer, each entered and left once per pass."""
        if not layers:
            return
        size = elements * self.element_bytes
        for backward in (False, True):
            if self.config.parallel.sequence_parallel:
                # Backward: the input is gathered again for the weights' gradient, beside the output's gradient.
                gathers = 4 if backward else 2
                yield Transfer("tp", "all_gather", "activations", gathers * layers, size, backward)
                yield Transfer("tp", "reduce_scatter", "activations", 2 * layers, size, backward)
            else:
                yield Transfer("tp", "all_reduce", "activations", 2 * layers, size, backward)

    def _all_reduce(self, elements: int, backward: bool = False) -> Transfer:
        return Transfer("tp", "all_reduce", "activations", 1, elements * self.element_bytes, backward)

    def _all_gather(self, elements: int, backward: bool = False) -> Transfer:
        return Transfer("tp", "all_gather", "activations", 1, elements * self.element_bytes, backward)

    def _boundaries(self, counts: MicroBatchCounts) -> Iterator[Transfer]:
        """What is sent to the next stage, and the gradient that goes to the stage before."""
        sent = [(self.stage.next_piece, False), (None if self.stage.is_first else self.stage.first_piece, True)]
        for piece, backward in sent:
            if piece is not None:
                size = boundary_elements(self.config, piece, counts) * self.element_bytes
                yield Transfer("pp", "send", "boundary", 1, size, backward)


def boundary_elements(config: RunConfig, piece: str, counts: MicroBatchCounts) -> int:
    """Return the elements that a stage beginning with ``piece`` receives (see ``parallel/pipeline.py``)."""
    vision, hidden, slots = config.vision, config.language.hidden_size, counts.slots
    ways = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    if piece == POOL or piece.startswith("vision."):
        return -(-slots * vision.num_tokens // ways) * vision.hidden_size
    if piece == LANGUAGE_EMBED:
        return slots * (vision.num_patches + 1) * hidden
    return (config.training.micro_batch_size * config.data.seq_length // ways + slots) * hidden


def merged(transfers: Iterable[Transfer], ranks: Ranks) -> tuple[Transfer, ...]:
    """Return transfers with equal ones counted together, those of groups of one rank left out."""
    calls: dict[tuple[Group, Kind, Purpose, int, bool], int] = {}
    for transfer in transfers:
        if ranks.size(transfer.group) > 1:
            key = (transfer.group, transfer.kind, transfer.purpose, transfer.call_bytes, transfer.backward)
            calls[key] = calls.get(key, 0) + transfer.calls
    return tuple(
        Transfer(group, kind, purpose, number, size, backward)
        for (group, kind, purpose, size, backward), number in calls.items()
    )


def totals(transfers: Sequence[Transfer]) -> dict[tuple[Group, Kind], tuple[int, int]]:
    """Return calls and bytes by group and kind."""
    found: dict[tuple[Group, Kind], tuple[int, int]] = {}
    for transfer in transfers:
        calls, size = found.get((transfer.group, transfer.kind), (0, 0))
        found[transfer.group, transfer.kind] = calls + transfer.calls, size + transfer.bytes
    return found
