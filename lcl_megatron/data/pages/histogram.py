"""A histogram of sizes that needs no range: exact below 128, then 64 bins between each power of two and the next."""

from __future__ import annotations

import numpy as np

EXACT = 128
"""Values below it have bins of their own."""
PER_OCTAVE = EXACT // 2
NUM_BINS = PER_OCTAVE * 57 + EXACT
"""Bins that hold every int64."""
SHORTCUT = 1 << 16
"""Values below it find their bin in a table: most of what is counted is small."""


class Histogram:
    """Counts non-negative integers in constant memory; minimum, maximum and sum are exact.

    A quantile is exact below 128 and at most 1/64 too low above.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(NUM_BINS, dtype=np.int64)
        """(bins,) how many values fell into each bin."""
        self.sum = 0
        """Sum of all values."""
        self.min = 0
        """Smallest value; 0 if there is none."""
        self.max = 0
        """Largest value; 0 if there is none."""

    @property
    def total(self) -> int:
        """Number of values."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean; 0 without values."""
        return self.sum / max(1, self.total)

    def add(self, values: np.ndarray) -> None:
        """Count non-negative integers."""
        if not len(values):
            return
        low, high = int(values.min()), int(values.max())
        self.min = min(self.min, low) if self.total else low
        self.max = max(self.max, high)
        self.sum += int(values.sum(dtype=np.int64))
        self.counts += np.bincount(SMALL_BINS[values] if high < SHORTCUT else bins_of(values), minlength=NUM_BINS)

    def quantile(self, share: float) -> int:
        """Return the lower edge of the bin that holds the quantile, at least ``min``; 0 without values."""
        if not self.total:
            return 0
        rank = min(self.total - 1, int(share * self.total))
        return max(self.min, int(LOWER_EDGES[np.searchsorted(np.cumsum(self.counts), rank, side="right")]))

    def below(self, limit: int) -> int:
        """Return how many values are below a limit: exactly if it is below 128, or begins a bin."""
        return int(self.counts[: int(bins_of(np.array([limit]))[0])].sum())

    def between(self, edges: np.ndarray) -> np.ndarray:
        """Return how many values lie in [edges[i], edges[i + 1]), to the precision of the bins."""
        first = np.searchsorted(LOWER_EDGES, edges)
        running = np.concatenate([[0], np.cumsum(self.counts)])[first]
        return np.diff(running)


def bins_of(values: np.ndarray) -> np.ndarray:
    """Return the bin, int64, of non-negative integers: the leading seven bits, and how far they are shifted."""
    values = np.asarray(values, dtype=np.int64)
    shift = np.maximum(np.frexp(values.astype(np.float64))[1].astype(np.int64) - 7, 0)
    return (shift << 6) + (values >> shift)


def _lower_edges() -> np.ndarray:
    bins = np.arange(NUM_BINS, dtype=np.int64)
    shift = np.maximum(bins // PER_OCTAVE - 1, 0)
    return (bins - PER_OCTAVE * shift) << shift


LOWER_EDGES = _lower_edges()
"""(bins,) int64, smallest value of each bin."""
SMALL_BINS = bins_of(np.arange(SHORTCUT))
