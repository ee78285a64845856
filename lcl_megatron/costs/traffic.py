"""Every collective and every transfer of one training step, as one rank takes part in it.

The rules follow the code that communicates, line by line: ``model/`` and megatron-core's tensor-parallel layers (tp),
``parallel/context.py`` (cp), ``parallel/pipeline.py`` (pp), ``parallel/contrastive.py`` (dp), megatron-core's DDP and
optimizer (dp_cp, all), and ``parallel/agreement.py`` (host); ``training/objective.py`` says how often. A test counts
what really happens on several ranks, and allows no difference.

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
from lcl_megatron.costs.counts import MicroBatchCounts, StepCounts
from lcl_megatron.costs.parameters import stage_parameters
from lcl_megatron.costs.portions import Portion, recomputed_layers
from lcl_megatron.model.line import HEADS, LANGUAGE_EMBED, POOL, VISION_EMBED, Stage, cut_line

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]
Group = Literal["tp", "cp", "dp", "dp_cp", "pp", "embedding", "model", "all", "host"]
"""``dp_cp`` = the ranks that hold the same parameters; ``model`` = those of one copy of the model; ``all`` = all ranks;
``host`` = all ranks, between processors."""
Purpose = Literal["activations", "features", "gradients", "parameters", "boundary", "norm", "agreement", "report"]
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
"""Bytes of a parameter and of an activation."""
HASH_BYTES = 8
"""Bytes of the hash of an image, and of that of a context."""
AGREED_FLAGS = 3
"""Bytes of ``parallel.agreement.StepFlags``."""


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
    cp: int = 1

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Ranks:
        """Return the groups of a run on ``world_size`` processes."""
        parallel = config.parallel
        tp, pp, cp = (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
        )
        return cls(tp, pp, world_size // (tp * pp * cp), cp)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters."""
        return self.dp * self.cp

    def size(self, group: Group) -> int:
        """Return the number of ranks of a group."""
        sizes = {
            "tp": self.tp,
            "cp": self.cp,
            "dp": self.dp,
            "dp_cp": self.replicas,
            "pp": self.pp,
            "embedding": 2,
            "model": self.tp * self.pp,
        }
        return sizes.get(group, self.tp * self.pp * self.replicas)


class StepTraffic:
    """The traffic of a run's steps on the ranks of one pipeline stage.

    Args:
        config: the run, vocabulary size known.
        world_size: number of processes.
        stage_index: pipeline stage.
        cp_rank: context-parallel rank; None = the last one, which never encodes fewer images than another.
    """

    def __init__(self, config: RunConfig, world_size: int, stage_index: int, cp_rank: int | None = None) -> None:
        self.config = config
        self.ranks = Ranks.of(config, world_size)
        self.cp_rank = self.ranks.cp - 1 if cp_rank is None else cp_rank
        self.stages = cut_line(config)
        self.stage: Stage = self.stages[stage_index]
        self.element_bytes = ELEMENT_BYTES[config.training.precision]
        self.parameters = stage_parameters(config, self.stage)
        self.buffers: tuple[Buffer, ...] = lay_out(
            self.parameters, config.parallel, self.element_bytes, self.ranks.replicas, self.stage.is_first
        )

    def step(self, counts: StepCounts) -> tuple[Transfer, ...]:
        """Return all transfers of one step, those of groups of one rank left out."""
        found: list[Transfer] = []
        passes_twice = counts.passes_twice(self.config.loss)
        for micro_batch, number in Counter(counts.micro_batches).items():
            once = [*self.micro_batch(micro_batch), *(self.features_pass(micro_batch) if passes_twice else ())]
            found += [dataclasses.replace(transfer, calls=number * transfer.calls) for transfer in once]
        found += self.contrast(counts)
        found += self.once(counts)
        return merged(found, self.ranks)

    def micro_batch(self, counts: MicroBatchCounts) -> list[Transfer]:
        """Return what forward and backward pass of one micro-batch move within a copy of the model."""
        portion = Portion(self.config, counts, self.cp_rank)
        return [*self._features(portion), *self._token_losses(portion), *self._boundaries(portion)]

    def features_pass(self, counts: MicroBatchCounts) -> list[Transfer]:
        """Return what a forward pass for features alone moves: no token losses, nothing backward."""
        portion = Portion(self.config, counts, self.cp_rank)
        return [t for t in (*self._features(portion), *self._boundaries(portion)) if not t.backward]

    def contrast(self, counts: StepCounts) -> list[Transfer]:
        """Return the gathers of features, of two hashes and of two floats per slot, on the last stage."""
        if not self.stage.is_last:
            return []
        slots = counts.contrasted_slots(self.config.loss)
        slot_bytes = (2 * self.config.language.hidden_size * FLOAT32_BYTES, 2 * HASH_BYTES, 2 * FLOAT32_BYTES)
        return [
            Transfer("dp", "all_gather", "features", calls, number * self.ranks.dp * size)
            for number, calls in Counter(slots).items()
            for size in slot_bytes
        ]

    def once(self, counts: StepCounts) -> list[Transfer]:
        """Return what moves once per step: gradients, parameters, gradient norm, agreement."""
        parallel = self.config.parallel
        found: list[Transfer] = []
        for buffer in self.buffers:
            for bucket in buffer.buckets:
                size = bucket.numel * GRADIENT_BYTES
                if parallel.use_distributed_optimizer:
                    found.append(Transfer("dp_cp", "reduce_scatter", "gradients", 1, size, backward=True))
                    found.append(Transfer("dp_cp", "all_gather", "parameters", 1, bucket.numel * buffer.element_bytes))
                else:
                    found.append(Transfer("dp_cp", "all_reduce", "gradients", 1, size, backward=True))
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
        found.append(Transfer("host", "all_reduce", "agreement", 1, counts.all_images + AGREED_FLAGS))
        return found

    def _features(self, portion: Portion) -> Iterator[Transfer]:
        """Everything up to pooled latents and context features."""
        yield from self._layers(portion)
        if self.stage.has(HEADS):
            yield from self._picked(portion.counts.slots)
        yield from self._shared_rows(portion)

    def _token_losses(self, portion: Portion) -> Iterator[Transfer]:
        """Token losses, and the regression of latents."""
        if not self.stage.has(HEADS):
            return
        loss, hidden = self.config.loss, self.config.language.hidden_size
        targets = max(1, portion.counts.targets)
        yield from self._picked(targets)
        if loss.latent_regression_loss_weight > 0:
            yield from self._picked(portion.counts.slots * self.config.vision.num_patches)
        yield self._all_reduce(targets * hidden, backward=True)
        # Maximum, target's logit and sum of exponentials; the backward pass computes each chunk again.
        full, rest = divmod(targets, loss.cross_entropy_chunk_size)
        for size, number in ((loss.cross_entropy_chunk_size, full), (rest, 1)):
            if size and number:
                for backward in (False, True):
                    yield Transfer("tp", "all_reduce", "activations", 3 * number, size * FLOAT32_BYTES, backward)
        # The sum of token losses, for the report.
        yield Transfer("cp", "all_reduce", "report", 1, FLOAT32_BYTES)

    def _picked(self, rows: int) -> Iterator[Transfer]:
        """Rows that their owner shares: only a sequence that is split has owners."""
        if self.config.parallel.sequence_parallel:
            yield self._all_reduce(rows * self.config.language.hidden_size)

    def _shared_rows(self, portion: Portion) -> Iterator[Transfer]:
        """What context-parallel ranks tell each other beside keys and values."""
        size = self.config.language.hidden_size * self.element_bytes
        pooled, latents = portion.gathered_images, portion.gathered_images * self.config.vision.num_patches
        if self.stage.has(LANGUAGE_EMBED):
            yield Transfer("cp", "all_gather", "activations", 1, latents * size)
            yield Transfer("cp", "reduce_scatter", "activations", 1, latents * size, backward=True)
        if self.stage.has(HEADS):
            yield Transfer("cp", "all_reduce", "activations", 1, portion.counts.slots * size)
            yield Transfer("cp", "all_gather", "activations", 1, pooled * size)

    def _layers(self, portion: Portion) -> Iterator[Transfer]:
        """Layers of both towers, and where sequences are split and joined."""
        config, stage, is_split = self.config, self.stage, self.config.parallel.sequence_parallel
        vision = portion.vision_tokens * config.vision.hidden_size
        language = portion.positions * config.language.hidden_size
        yield from self._vision_layers(portion)
        yield from self._language_layers(language)
        if stage.has(LANGUAGE_EMBED):
            yield self._all_reduce(language)
        if is_split and stage.has(VISION_EMBED):
            yield self._all_gather(vision, backward=True)
        if is_split and stage.has(POOL):
            yield self._all_gather(vision)
        if is_split and stage.has(LANGUAGE_EMBED):
            yield self._all_gather(language, backward=True)

    def _vision_layers(self, portion: Portion) -> Iterator[Transfer]:
        layers = self.stage.layers("vision")
        again = recomputed_layers(self.config, "vision", layers)
        scales = self.config.vision.layer_scale_init is not None
        for layer in layers:
            elements = portion.branch_tokens(layer) * self.config.vision.hidden_size
            # What is kept last: an input of LayerScale or of drop-path, behind the reduction; else of a product.
            is_kept_behind = scales or portion.has_flags(layer) or portion.is_subset(layer)
            yield from self._layer(elements, (1 + is_kept_behind) if layer in again else 0)

    def _language_layers(self, elements: int) -> Iterator[Transfer]:
        layers = self.stage.layers("language")
        again = recomputed_layers(self.config, "language", layers)
        # Keys and values of all context-parallel ranks; a tensor-parallel rank's heads of them.
        fetched = 2 * elements * self.ranks.cp // self.ranks.tp * self.element_bytes
        for layer in layers:
            yield from self._layer(elements, int(layer in again))
            yield Transfer("cp", "all_gather", "activations", 1, fetched)
            yield Transfer("cp", "reduce_scatter", "activations", 1, fetched, backward=True)
            if layer in again:
                yield Transfer("cp", "all_gather", "activations", 1, fetched, backward=True)

    def _layer(self, elements: int, sums_again: int) -> Iterator[Transfer]:
        """Two pairs of products, each entered and left once per pass.

        Args:
            elements: of the residual stream that both pass.
            sums_again: sums behind a pair that the backward pass makes again. torch stops recomputing at the last
                tensor that was kept, so that the second sum may be left out.
        """
        size = elements * self.element_bytes
        for backward in (False, True):
            again = sums_again if backward else 0
            if self.config.parallel.sequence_parallel:
                # Backward: the input is gathered again for the weights' gradient, beside the output's gradient.
                gathers = (4 if backward else 2) + (2 if again else 0)
                yield Transfer("tp", "all_gather", "activations", gathers, size, backward)
                yield Transfer("tp", "reduce_scatter", "activations", 2 + again, size, backward)
            else:
                yield Transfer("tp", "all_reduce", "activations", 2 + again, size, backward)

    def _all_reduce(self, elements: int, backward: bool = False) -> Transfer:
        return Transfer("tp", "all_reduce", "activations", 1, elements * self.element_bytes, backward)

    def _all_gather(self, elements: int, backward: bool = False) -> Transfer:
        return Transfer("tp", "all_gather", "activations", 1, elements * self.element_bytes, backward)

    def _boundaries(self, portion: Portion) -> Iterator[Transfer]:
        """What is sent to the next stage, and the gradient that goes to the stage before."""
        sent = [(self.stage.next_piece, False), (None if self.stage.is_first else self.stage.first_piece, True)]
        for piece, backward in sent:
            if piece is not None:
                size = boundary_elements(piece, portion) * self.element_bytes
                yield Transfer("pp", "send", "boundary", 1, size, backward)


def boundary_elements(piece: str, portion: Portion) -> int:
    """Return the elements that a stage beginning with ``piece`` receives (see ``parallel/pipeline.py``)."""
    vision, hidden, parallel = portion.config.vision, portion.config.language.hidden_size, portion.config.parallel
    ways = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    if piece == POOL or piece.startswith("vision."):
        return portion.vision_tokens // ways * vision.hidden_size
    if piece == LANGUAGE_EMBED:
        return portion.images * (vision.num_patches + 1) * hidden
    return (portion.positions // ways + portion.images) * hidden


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
