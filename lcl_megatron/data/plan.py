"""Which rows an optimizer step reads, on which rank and in which micro-batch: a pure function of (seed, step).

Step ``s`` reads the rows ``[s * G, (s + 1) * G)`` of the run's sequence of rows, G being the global batch size. So the
number of consumed rows alone says where a run stands, also when it goes on with another number of ranks or workers,
or with another global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lcl_megatron.config.errors import require
from lcl_megatron.data.batch import StepLayout
from lcl_megatron.data.compose import concatenate_ranges
from lcl_megatron.data.packing import deal_evenly
from lcl_megatron.data.rows import EpochStatistics, PlannedRow, RowSequence, WindowStart

if TYPE_CHECKING:
    from lcl_megatron.config.run import DataConfig
    from lcl_megatron.data.corpus import Corpus


@dataclass(frozen=True)
class StepPlan:
    """The rows of one optimizer step on all ranks."""

    step: int
    """Index of the optimizer step."""
    first_row: int
    """Rows consumed before this step."""
    layout: StepLayout
    """Counts on all ranks."""
    rows: tuple[PlannedRow, ...]
    """The global batch, in the order of the sequence."""
    dealt: np.ndarray
    """(micro-batches, data-parallel ranks, micro-batch size) int64, positions in ``rows``."""

    def micro_batches(self, dp_rank: int) -> tuple[tuple[PlannedRow, ...], ...]:
        """Return the rows of every micro-batch of a data-parallel rank."""
        return tuple(tuple(self.rows[i] for i in group[dp_rank]) for group in self.dealt)


class Plan:
    """The order of a run. Picklable; holds no state but caches.

    Args:
        corpus: The corpus.
        data_config: Composition and packing.
        num_latents: Latents per image.
        global_batch_size: Rows G of an optimizer step.
        micro_batch_size: Rows of a micro-batch on one rank.
        data_parallel_size: Number of data-parallel ranks.
        seed: Seed of the run.
        start: Saves a resumed run the packing of all earlier windows; see ``window_start``.

    Raises:
        ConfigError: If the batch cannot be divided, or the configuration leaves no rows (see ``RowSequence``).
    """

    def __init__(
        self,
        corpus: Corpus,
        data_config: DataConfig,
        num_latents: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        seed: int,
        start: WindowStart | None = None,
    ) -> None:
        unit = micro_batch_size * data_parallel_size
        require(
            unit > 0 and global_batch_size > 0 and global_batch_size % unit == 0,
            f"training.global_batch_size = {global_batch_size} is not a positive multiple of micro_batch_size x "
            f"data-parallel ranks = {micro_batch_size} x {data_parallel_size} = {unit}; change one of them",
        )
        self.sequence = RowSequence(corpus, data_config, num_latents, seed, start)
        """All rows of the run."""
        self.global_batch_size = global_batch_size
        """G."""
        self.micro_batch_size = micro_batch_size
        """Rows of a micro-batch on one rank."""
        self.data_parallel_size = data_parallel_size
        """Number of data-parallel ranks."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

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
        """
        first_row = step * self.global_batch_size if first_row is None else first_row
        block = self.sequence.read(first_row, self.global_batch_size)
        counts = block.counts
        dealt = self._deal(counts.num_images)
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

    def window_start(self, consumed_rows: int) -> WindowStart:
        """Return where a run that has consumed so many rows goes on: two integers that make its resumption instant."""
        return self.sequence.window_start(consumed_rows)

    def num_rows_per_epoch(self, epoch: int = 0) -> int:
        """Return the rows of an epoch, which differ a little between epochs. Packs the whole epoch."""
        return self.sequence.num_rows_per_epoch(epoch)

    def statistics(self, epoch: int = 0) -> EpochStatistics:
        """Return what an epoch holds, and what it skips and why. Packs the whole epoch."""
        return self.sequence.statistics(epoch)

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
