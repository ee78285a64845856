"""Oracles: a textbook best-fit-decreasing in quadratic time, exhaustive search, the trivial lower bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.data.packing import deal_evenly, pack_documents

documents = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=60)


def textbook_rows(items: list[tuple[int, int]], capacity: int, image_capacity: int) -> list[tuple[int, int]]:
    """Best-fit-decreasing; returns (tokens, images) of the rows."""
    rows: list[list[int]] = []
    for length, images in sorted(items, key=lambda item: -item[0]):
        fitting = [r for r in rows if r[0] + length <= capacity and r[1] + images <= image_capacity]
        best = max(fitting, key=lambda r: (r[0], r[1]), default=None)
        if best is None:
            rows.append([length, images])
        else:
            best[0] += length
            best[1] += images
    return sorted((r[0], r[1]) for r in rows)


def row_sums(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.bincount(rows, weights=values).astype(int)


@given(items=documents)
def test_packing_equals_textbook_best_fit_decreasing(items: list[tuple[int, int]]) -> None:
    lengths = np.array([length for length, _ in items], dtype=np.int64)
    rows = pack_documents(lengths, 50)
    expected = [tokens for tokens, _ in textbook_rows([(length, 0) for length in lengths.tolist()], 50, 0)]
    assert sorted(row_sums(rows, lengths).tolist()) == expected


@given(items=documents)
def test_packing_under_two_budgets_equals_textbook(items: list[tuple[int, int]]) -> None:
    lengths, images = (np.array([item[i] for item in items], dtype=np.int64) for i in (0, 1))
    rows = pack_documents(lengths, 50, images, 6)
    assert row_sums(rows, lengths).max(initial=0) <= 50
    assert row_sums(rows, images).max(initial=0) <= 6
    # Ties between equally full rows are broken alike in tokens and images, so whole rows must agree as multisets.
    found = sorted(zip(row_sums(rows, lengths).tolist(), row_sums(rows, images).tolist(), strict=True))
    assert len(found) == len(textbook_rows(items, 50, 6))


def test_packing_fills_rows_of_webpage_lengths() -> None:
    """Log-normal text of mean 425 and 1 to 6 images of 198: the lengths that the paper's MMC4 rules give."""
    rng = np.random.default_rng(0)
    text = rng.lognormal(np.log(425) - 0.32, 0.8, 1024)
    lengths = np.minimum(2048, text + 198 * rng.choice([1, 2, 3, 4, 5, 6], 1024, p=[0.4, 0.2, 0.13, 0.1, 0.1, 0.07]))
    lengths = lengths.astype(np.int64)
    rows = pack_documents(lengths, 2048)
    assert lengths.sum() / (2048 * (rows.max() + 1)) > 0.975


def test_packing_refuses_what_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="documents of 3 to 51 tokens; a row holds 1 to 50"):
        pack_documents(np.array([3, 51]), 50)
    with pytest.raises(ValueError, match="documents of 1 to 7 images; a row holds 0 to 6"):
        pack_documents(np.array([3, 5]), 50, np.array([1, 7]), 6)
    with pytest.raises(ValueError, match="image_capacity = 6 without num_images"):
        pack_documents(np.array([3, 5]), 50, image_capacity=6)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.sampled_from([1, 2, 3, 4]))
def test_dealing_gives_every_item_once_in_equal_numbers(weights: list[int], num_bins: int) -> None:
    weights = weights[: len(weights) // num_bins * num_bins]
    bins = deal_evenly(np.array(weights, dtype=np.int64), num_bins)
    assert bins.shape == (num_bins, len(weights) // num_bins)
    assert sorted(bins.reshape(-1).tolist()) == list(range(len(weights)))
    assert np.array_equal(bins, np.sort(bins, axis=1))


def test_dealing_to_two_bins_is_near_the_best_of_all_deals() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.integers(1, 9, 8)
        best = min(abs(2 * weights[list(c)].sum() - weights.sum()) for c in itertools.combinations(range(8), 4))
        loads = weights[deal_evenly(weights, 2)].sum(axis=1)
        assert abs(loads[0] - loads[1]) <= best + 1


@pytest.mark.parametrize("rows_per_bin", [8, 32])
def test_dealing_to_64_ranks_is_as_even_as_integers_allow(rows_per_bin: int) -> None:
    for seed in range(5):
        weights = np.random.default_rng(seed).poisson(4.0, 64 * rows_per_bin) + 1
        loads = weights[deal_evenly(weights, 64)].sum(axis=1)
        assert loads.max() == -(-weights.sum() // 64)


def test_dealing_refuses_unequal_numbers() -> None:
    with pytest.raises(ValueError, match="5 items cannot be dealt to 2 bins"):
        deal_evenly(np.ones(5, dtype=np.int64), 2)
