"""Oracles: exhaustive search, the trivial lower bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.data.planning.dealing import deal_evenly


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
