"""What micro-batches hold: the only thing that costs depend on beside the configuration and the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcl_megatron.config import LossConfig, RunConfig
from lcl_megatron.config.errors import require

if TYPE_CHECKING:
    from lcl_megatron.data.batch import PackedBatch, StepLayout
    from lcl_megatron.data.planning.mixture import RowSequence

SAMPLED_ROWS = 8192
"""Rows of a corpus whose means stand for all of it."""


@dataclass(frozen=True)
class RowMeans:
    """What a row holds on average."""

    images: float
    """Images."""
    tokens: float
    """Positions that hold a document, image latents included."""
    targets: float
    """Text positions that have a label."""
    squared_lengths: float
    """Sum over the row's documents of length squared, for the cost of attention."""

    def __post_init__(self) -> None:
        for name in ("images", "tokens", "targets", "squared_lengths"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0 and (value > 0 or name != "tokens"),
                f"mean {name} of a row = {value}; it must be finite and positive",
            )

    @classmethod
    def of_sequence(cls, sequence: RowSequence) -> RowMeans:
        """Return the means of a corpus or a mixture, over its first 8,192 rows."""
        counts = sequence.read(0, SAMPLED_ROWS).counts
        return cls(
            images=float(counts.num_images.mean()),
            tokens=float(counts.num_tokens.mean()),
            targets=float(counts.num_targets.mean()),
            squared_lengths=float(counts.squared_lengths.mean()),
        )

    @classmethod
    def of_numbers(cls, config: RunConfig, images: float, fill: float, documents: float) -> RowMeans:
        """Return the means of rows of equal documents.

        Args:
            config: gives the length of a row and the latents of an image.
            images: images of a row.
            fill: share of a row's positions that hold a document.
            documents: documents of a row.

        Raises:
            ConfigError: the images do not fit the row.
        """
        require(0 < fill <= 1, f"fill = {fill}; give the share of a row's positions that hold documents, in (0, 1]")
        require(documents > 0, f"documents per row = {documents}; it must be positive")
        tokens, latents = fill * config.data.seq_length, config.vision.num_patches
        # Beside its latents an image has <BoI> and <EoI>; targets are all but latents, <EoI> and the first token.
        targets = tokens - images * (latents + 1) - documents
        require(
            targets >= 0,
            f"{images:g} images of {latents} latents leave no text in rows of {tokens:.0f} tokens "
            f"(data.seq_length = {config.data.seq_length}, filled to {fill:.0%}); lower --images-per-row or raise "
            "--seq-length",
        )
        return cls(images, tokens, targets, tokens**2 / documents)


@dataclass(frozen=True)
class MicroBatchCounts:
    """One micro-batch on one rank."""

    images: int
    """Real images of this data-parallel rank."""
    targets: int
    """Text targets of this rank: under context parallelism those at its positions."""
    most_images: int
    """Real images of the data-parallel rank that has the most."""
    fetched_keys: int = 0
    """Under context parallelism, the keys that this rank's queries attend to, summed over its runs of queries."""

    @property
    def slots(self) -> int:
        """Image slots of this data-parallel rank; a micro-batch without images has a blank one."""
        return max(1, self.images)

    @property
    def gathered_slots(self) -> int:
        """Slots that each rank contributes to a gather: as many as the fullest has."""
        return max(1, self.most_images)


@dataclass(frozen=True)
class StepCounts:
    """One optimizer step on one rank."""

    micro_batches: tuple[MicroBatchCounts, ...]
    """This rank's micro-batches."""
    all_images: int
    """Images of the global batch."""
    most_slots: int
    """Image slots, in all micro-batches, of the data-parallel rank that has the most."""

    def contrasts_all(self, loss: LossConfig) -> bool:
        """Return whether several micro-batches are contrasted at once (see ``training/objective.py``)."""
        is_global = loss.contrastive_scope == "global" and loss.contrastive_loss_weight > 0
        return is_global and len(self.micro_batches) > 1

    def passes_twice(self, loss: LossConfig) -> bool:
        """Return whether a forward pass for features goes before the others."""
        return self.contrasts_all(loss) and not loss.contrastive_keep_graphs

    def contrasted_slots(self, loss: LossConfig) -> list[int]:
        """Return the slots of each contrast that every data-parallel rank contributes to it."""
        if self.contrasts_all(loss):
            return [self.most_slots]
        return [micro_batch.gathered_slots for micro_batch in self.micro_batches]

    @classmethod
    def of_means(cls, config: RunConfig, means: RowMeans, dp_size: int) -> StepCounts:
        """Return a step whose micro-batches all hold the mean, images rounded up."""
        training, cp = config.training, config.parallel.context_parallel_size
        rows = training.micro_batch_size
        images = math.ceil(means.images * rows)
        number = training.global_batch_size // (rows * dp_size)
        keys = math.ceil(rows * _fetched_keys(config, means)) if cp > 1 else 0
        micro_batch = MicroBatchCounts(images, round(means.targets * rows / cp), images, keys)
        all_images = round(means.images * training.global_batch_size)
        return cls((micro_batch,) * number, all_images, micro_batch.slots * number)

    @classmethod
    def of_batch(cls, micro_batches: tuple[PackedBatch, ...], layout: StepLayout) -> StepCounts:
        """Return the counts of what a rank has read.

        Args:
            micro_batches: what the rank computes of them, see ``model/row_edge.py``.
            layout: counts of the step on all ranks.
        """
        counts = tuple(
            MicroBatchCounts(
                images=batch.num_images,
                targets=len(batch.label_positions),
                most_images=int(most),
                fetched_keys=0 if batch.runs is None else len(batch.runs.key_rows),
            )
            for batch, most in zip(micro_batches, layout.num_images.max(axis=1), strict=True)
        )
        slots = np.maximum(layout.num_images, 1).sum(axis=0)
        return cls(counts, int(layout.num_images.sum()), int(slots.max()))


def _fetched_keys(config: RunConfig, means: RowMeans) -> float:
    """Return the keys of a row that a context-parallel rank's queries attend to, on average.

    Each of its two chunks, and what stands before the chunk in the document that crosses its begin: half of a document.
    """
    length, cp = config.data.seq_length, config.parallel.context_parallel_size
    return length / cp + means.squared_lengths / means.tokens * (1 - 1 / (2 * cp))
