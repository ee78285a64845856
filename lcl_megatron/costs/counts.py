"""What micro-batches hold: the only thing that costs depend on beside the configuration and the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcl_megatron.config import RunConfig
from lcl_megatron.config.errors import require

if TYPE_CHECKING:
    from lcl_megatron.data.batch import PackedBatch, StepLayout
    from lcl_megatron.data.planning.mixture import RowSequence

Scope = Literal["micro_batch", "global"]
"""Which images are contrasted with each other."""
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
    """One micro-batch on one data-parallel rank."""

    images: int
    """Real images of this rank."""
    targets: int
    """Text targets of this rank."""
    most_images: int
    """Real images of the data-parallel rank that has the most."""

    @property
    def slots(self) -> int:
        """Image slots of this rank; a micro-batch without images has a blank one."""
        return max(1, self.images)

    @property
    def gathered_slots(self) -> int:
        """Slots that each rank contributes to a gather: as many as the fullest has."""
        return max(1, self.most_images)


@dataclass(frozen=True)
class StepCounts:
    """One optimizer step on one data-parallel rank."""

    micro_batches: tuple[MicroBatchCounts, ...]
    """This rank's micro-batches."""
    all_images: int
    """Images of the global batch."""

    def contrasted_slots(self, scope: Scope) -> list[int]:
        """Return the slots of each contrast that every data-parallel rank contributes to it.

        Of a whole step, a rank's slots are added up first: ranks have about equally many.
        """
        slots = [micro_batch.gathered_slots for micro_batch in self.micro_batches]
        return [sum(slots)] if scope == "global" else slots

    @classmethod
    def of_means(cls, config: RunConfig, means: RowMeans, dp_size: int) -> StepCounts:
        """Return a step whose micro-batches all hold the mean, images rounded up."""
        training = config.training
        images = math.ceil(means.images * training.micro_batch_size)
        targets = round(means.targets * training.micro_batch_size)
        number = training.global_batch_size // (training.micro_batch_size * dp_size)
        micro_batch = MicroBatchCounts(images, targets, images)
        return cls((micro_batch,) * number, round(means.images * training.global_batch_size))

    @classmethod
    def of_batch(cls, micro_batches: tuple[PackedBatch, ...], layout: StepLayout) -> StepCounts:
        """Return the counts of what a rank has read."""
        counts = tuple(
            MicroBatchCounts(batch.num_images, len(batch.label_positions), int(most))
            for batch, most in zip(micro_batches, layout.num_images.max(axis=1), strict=True)
        )
        return cls(counts, int(layout.num_images.sum()))
