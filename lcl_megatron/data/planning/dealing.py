"""Items to bins in equal numbers so that their weights are even: rows to ranks by their images."""

from __future__ import annotations

import numpy as np


def deal_evenly(weights: np.ndarray, num_bins: int) -> np.ndarray:
    """Deal items into bins of equal numbers so that the bins' weights are even.

    Rounds of one item per bin, the heaviest items first, the heaviest of a round to the lightest bin; then items are
    exchanged between the heaviest and the lightest bin as long as that brings them closer.

    Args:
        weights: (n,) non-negative integers; n is a multiple of ``num_bins``.
        num_bins: Number of bins.

    Returns:
        (num_bins, n / num_bins) int64, item indices, ascending within a bin.

    Raises:
        ValueError: If n is not a multiple of ``num_bins``.
    """
    weights = np.asarray(weights, dtype=np.int64)
    if num_bins < 1 or len(weights) % num_bins:
        raise ValueError(f"{len(weights)} items cannot be dealt to {num_bins} bins in equal numbers")
    bins = np.empty((num_bins, len(weights) // num_bins), dtype=np.int64)
    totals = np.zeros(num_bins, dtype=np.int64)
    for turn, items in enumerate(np.argsort(-weights, kind="stable").reshape(-1, num_bins)):
        lightest_first = np.argsort(totals, kind="stable")
        bins[lightest_first, turn] = items
        totals[lightest_first] += weights[items]
    for _ in range(len(weights)):
        if not _exchange(weights, bins, totals):
            break
    return np.sort(bins, axis=1)


def _exchange(weights: np.ndarray, bins: np.ndarray, totals: np.ndarray) -> bool:
    """Exchange one item of the heaviest bin with one of the lightest, in place; return whether that helped."""
    heavy, light = int(np.argmax(totals)), int(np.argmin(totals))
    gap = int(totals[heavy] - totals[light])
    if gap < 2:
        return False
    # Items of equal weight are interchangeable: one of each keeps the table small however large the bins are.
    heavy_weights, heavy_items = np.unique(weights[bins[heavy]], return_index=True)
    light_weights, light_items = np.unique(weights[bins[light]], return_index=True)
    moved = heavy_weights[:, None] - light_weights[None, :]
    left_over = np.where((moved > 0) & (moved < gap), np.abs(gap - 2 * moved), gap)
    i, j = np.unravel_index(int(np.argmin(left_over)), left_over.shape)
    if left_over[i, j] >= gap:
        return False
    a, b = (heavy, heavy_items[i]), (light, light_items[j])
    bins[a], bins[b] = bins[b], bins[a]
    totals[heavy] -= moved[i, j]
    totals[light] += moved[i, j]
    return True
