"""Whole documents into rows, and rows to ranks: best fit for the one, even image counts for the other."""

from __future__ import annotations

import numpy as np


def pack_documents(
    lengths: np.ndarray, capacity: int, num_images: np.ndarray | None = None, image_capacity: int = 0
) -> np.ndarray:
    """Pack documents into as few rows as best-fit-decreasing finds: the longest first, each into the fullest row.

    The free space of all open rows is one Python integer with a bit per amount, so that the fullest row that still
    has room is its lowest set bit above the document's length: three operations per document, whatever the number of
    rows. Among equals the earlier document comes first, so the result is a function of the arguments alone.

    Args:
        lengths: (n,) integers in [1, capacity], tokens of each document.
        capacity: Tokens of a row.
        num_images: (n,) images of each document; needed with ``image_capacity``.
        image_capacity: Images that a row may hold; 0 = no limit.

    Returns:
        (n,) int64, row of each document; rows are numbered from 0 without gaps.

    Raises:
        ValueError: If a document fits into no row.
    """
    lengths = np.asarray(lengths)
    if image_capacity and num_images is None:
        raise ValueError(f"image_capacity = {image_capacity} without num_images: nothing could be held to it")
    images = np.asarray(num_images) if image_capacity else np.zeros_like(lengths)
    for name, values, low, limit in (("tokens", lengths, 1, capacity), ("images", images, 0, image_capacity)):
        if values.size and (values.min() < low or values.max() > limit):
            raise ValueError(f"documents of {values.min()} to {values.max()} {name}; a row holds {low} to {limit}")
    order = np.argsort(-lengths, kind="stable")
    if image_capacity:
        rows = _best_fit_two(lengths[order].tolist(), images[order].tolist(), capacity, image_capacity)
    else:
        rows = _best_fit(lengths[order].tolist(), capacity)
    result = np.empty(len(lengths), dtype=np.int64)
    result[order] = rows
    return result


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


def _best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Return the row of each document, for lengths in descending order."""
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    rows, num_rows = [], 0
    for length in lengths:
        fitting = free >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            stack = open_rows[space]
            row = stack.pop()
            if not stack:
                free ^= 1 << space
            space -= length
        else:
            row, space = num_rows, capacity - length
            num_rows += 1
        if space:
            stack = open_rows[space]
            if not stack:
                free |= 1 << space
            stack.append(row)
        rows.append(row)
    return rows


def _best_fit_two(lengths: list[int], images: list[int], capacity: int, image_capacity: int) -> list[int]:
    """Return the row of each document under both budgets; among equally full rows the one with fewest images left."""
    open_rows: list[dict[int, list[int]]] = [{} for _ in range(image_capacity + 1)]
    free = [0] * (image_capacity + 1)
    rows, num_rows = [], 0
    for length, count in zip(lengths, images, strict=True):
        best, left = capacity + 1, -1
        for images_left in range(count, image_capacity + 1):
            fitting = free[images_left] >> length
            if fitting:
                space = length + (fitting & -fitting).bit_length() - 1
                if space < best:
                    best, left = space, images_left
        if left >= 0:
            stack = open_rows[left][best]
            row = stack.pop()
            if not stack:
                free[left] ^= 1 << best
            space, left = best - length, left - count
        else:
            row, space, left = num_rows, capacity - length, image_capacity - count
            num_rows += 1
        if space:
            open_rows[left].setdefault(space, []).append(row)
            free[left] |= 1 << space
        rows.append(row)
    return rows
