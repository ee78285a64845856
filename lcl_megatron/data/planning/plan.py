"""Which rows an optimizer step reads, on which rank and in which micro-batch: a pure function of (seed, step).

Step ``s`` reads the rows ``[s * G, (s + 1) * G)`` of the run's sequence of rows, G being the global batch size. So the
number of consumed rows alone says where a run stands, also when it goes on with another number of ranks or workers,
or with another global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcl_megatron.config.errors import require
from lcl_megatron.data.batch import StepLayout
from lcl_megatron.data.planning.compose import concatenate_ranges
from lcl_megatron.data.planning.dealing import deal_evenly
from lcl_megatron.data.planning.mixture import RowSequence
from lcl_megatron.data.planning.rows import PlannedRow

if TYPE_CHECKING:
    from lcl_megatron.config.run import DataConfig
    from lcl_megatron.data.storage.corpus import Corpus

CHECKED_STEPS = 4
"""Steps that are planned at the start to see whether they fit the image budget; all others are much like them."""


@dataclass(frozen=True)
class StepPlan:
    """The rows of one optimizer step on all ranks."""

    step: int
    """Index of the optimizer step."""
    first_row: int
    """Rows consumed before this step."""
    layout: StepLayout
    """Counts on all ranks."""
    rows: Sequence[PlannedRow]
    """The global batch, in the order of the sequence."""
    dealt: np.ndarray
    """(micro-batches, data-parallel ranks, micro-batch size) int64, positions in ``rows``."""

    def micro_batches(self, dp_rank: int) -> tuple[tuple[PlannedRow, ...], ...]:
        """Return the rows of every micro-batch of a data-parallel rank."""
        return tuple(tuple(self.rows[i] for i in group[dp_rank]) for group in self.dealt)


class Plan:
    """The order of a run. Picklable; holds no state but caches.

    Args:
        corpora: The corpora, in the order of ``data.data_path``.
        data_config: Mixture, composition and layout.
        num_latents: Latents per image.
        global_batch_size: Rows G of an optimizer step.
        micro_batch_size: Rows of a micro-batch on one rank.
        data_parallel_size: Number of data-parallel ranks.
        seed: Seed of the run.

    Raises:
        ConfigError: If the batch cannot be divided, the configuration leaves no rows (see ``RowSequence``), or the
            images of the first steps do not fit the budget of a micro-batch.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        data_config: DataConfig,
        num_latents: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        seed: int,
    ) -> None:
        unit = micro_batch_size * data_parallel_size
        require(
            unit > 0 and global_batch_size > 0 and global_batch_size % unit == 0,
            f"training.global_batch_size = {global_batch_size} is not a positive multiple of micro_batch_size x "
            f"data-parallel ranks = {micro_batch_size} x {data_parallel_size} = {unit}; change one of them",
        )
        self.sequence = RowSequence(corpora, data_config, num_latents, seed)
        """All rows of the run."""
        self.global_batch_size = global_batch_size
        """G."""
        self.micro_batch_size = micro_batch_size
        """Rows of a micro-batch on one rank."""
        self.data_parallel_size = data_parallel_size
        """Number of data-parallel ranks."""
        if data_config.max_images_per_micro_batch:
            for step in range(CHECKED_STEPS):
                self.step(step)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def description(self) -> dict[str, str]:
        """All that decides the sequence of rows, by name."""
        return self.sequence.description

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the sequence of rows, but not of how rows are dealt to ranks."""
        return self.sequence.fingerprint

    def step(self, step: int, first_row: int | None = None) -> StepPlan:
        """Return the rows of an optimizer step, and who gets them.

        The global batch is dealt first to its contrast groups (micro-batch m of all ranks), then inside a group to
        ranks, so that image counts are even. Groups therefore hold the same rows whenever
        ``micro_batch_size * data_parallel_size`` is the same.

        Args:
            step: Index of the step.
            first_row: Rows consumed before it; None = ``step * global_batch_size``.

        Raises:
            ConfigError: If a micro-batch has more images than ``data.max_images_per_micro_batch``.
        """
        first_row = step * self.global_batch_size if first_row is None else first_row
        block = self.sequence.read(first_row, self.global_batch_size)
        counts = block.counts
        dealt = self._deal(counts.num_images)
        self._check_budget(step, counts.num_images[dealt].sum(axis=2))
        order = dealt.reshape(-1)
        first_image = np.cumsum(counts.num_images) - counts.num_images
        _, images = concatenate_ranges(first_image[order], counts.num_images[order])
        layout = StepLayout(
            num_images=counts.num_images[dealt].sum(axis=2),
            has_context=block.has_context[images],
            num_targets=int(counts.num_targets.sum()),
            num_tokens=int(counts.num_tokens.sum()),
            sum_squared_lengths=int(counts.squared_lengths.sum()),
        )
        return StepPlan(step=step, first_row=first_row, layout=layout, rows=block.rows, dealt=dealt)

    def _deal(self, num_images: np.ndarray) -> np.ndarray:
        """Return (micro-batches, ranks, micro-batch size) positions of rows."""
        groups = deal_evenly(num_images, self.num_micro_batches)
        dealt = np.empty((len(groups), self.data_parallel_size, self.micro_batch_size), dtype=np.int64)
        totals = np.zeros(self.data_parallel_size, dtype=np.int64)
        for m, group in enumerate(groups):
            bins = group[deal_evenly(num_images[group], self.data_parallel_size)]
            loads = num_images[bins].sum(axis=1)
            # The rank with the fewest images so far gets the fullest of the nearly equal bins.
            ranks = np.argsort(totals, kind="stable")
            fullest_first = np.argsort(-loads, kind="stable")
            dealt[m, ranks] = bins[fullest_first]
            totals[ranks] += loads[fullest_first]
        return dealt

    def _check_budget(self, step: int, num_images: np.ndarray) -> None:
        """Refuse a step whose fullest micro-batch is over the budget, before it is out of memory."""
        budget, largest = self.sequence.config.max_images_per_micro_batch, int(num_images.max())
        require(
            not budget or largest <= budget,
            f"step {step}: {num_images.sum()} images are dealt to {num_images.size} micro-batches as evenly as can be, "
            f"and one has {largest}, more than data.max_images_per_micro_batch = {budget}; raise it, "
            "or lower --micro-batch-size or --max-images-per-row",
        )
