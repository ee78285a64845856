"""Oracles: all items of a few periods with their times as exact fractions, sorted; counting over stretches."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.data.planning.even_order import EvenMerge, even_step

rates_lists = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


def slowly(rates: list[int], count: int) -> list[tuple[int, int]]:
    periods = count // sum(rates) + 1
    items = [
        (Fraction(2 * number + 1, 2 * rate), stream, number)
        for stream, rate in enumerate(rates)
        for number in range(periods * rate)
    ]
    return [(stream, number) for _, stream, number in sorted(items)][:count]


def located(rates: list[int], first: int, count: int) -> list[tuple[int, int]]:
    streams, numbers = EvenMerge(rates).locate(first, count)
    return list(zip(streams.tolist(), numbers.tolist(), strict=True))


@given(rates=rates_lists, first=st.integers(0, 100), count=st.integers(1, 60))
def test_any_stretch_equals_the_sorted_times(rates: list[int], first: int, count: int) -> None:
    # Times that are not equal differ by at least 1 / (4 * 40 * 40), far more than a tick of 2**-31.
    assert located(rates, first, count) == slowly(rates, first + count)[first:]


def test_shares_hold_in_every_stretch_however_far_and_however_large_the_rates() -> None:
    rates = [3, 100_000_001, 40_000_000, 7_654_321, 1]
    merge = EvenMerge(rates)
    for first in (0, merge.period - 500, 10**12, 2**52):
        streams, numbers = merge.locate(first, 1000)
        counts = np.bincount(streams, minlength=5)
        expected = 1000 * np.array(rates) / sum(rates)
        assert np.abs(counts - expected).max() <= 2
        for stream in range(5):
            assert (np.diff(numbers[streams == stream]) == 1).all()
        again = [merge.locate(first + offset, 100) for offset in range(0, 1000, 100)]
        assert np.array_equal(np.concatenate([numbers for _, numbers in again]), numbers)


def test_a_period_gives_every_stream_its_rate() -> None:
    streams, numbers = EvenMerge([5, 0, 3, 11]).locate(19 * 4, 19)
    assert np.bincount(streams).tolist() == [5, 0, 3, 11]
    assert sorted(numbers[streams == 3].tolist()) == list(range(44, 55))


def test_rates_and_positions_that_cannot_be() -> None:
    for rates in ([], [0, 0], [1, -1], [2**31]):
        with pytest.raises(ValueError, match="expected 0 or more each, and a sum of 1 to"):
            EvenMerge(rates)
    with pytest.raises(IndexError, match="position -1 of a merged order"):
        EvenMerge([1]).locate(-1, 1)


@given(n=st.integers(1, 5000))
def test_steps_visit_everything_once(n: int) -> None:
    step = even_step(n)
    assert sorted(step * k % n for k in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [97, 1000, 2376, 65_536, 1_000_003, 720_720])
def test_steps_sample_every_stretch_evenly(n: int) -> None:
    """Any stretch of places has its share of any range of the list, to a few items; random places miss by 100."""
    visited = even_step(n) * np.arange(n, dtype=np.int64) % n
    rng = np.random.default_rng(0)
    for _ in range(50):
        low, high = np.sort(rng.integers(0, n + 1, 2))
        drift = np.cumsum((low <= visited) & (visited < high)) - (high - low) / n * np.arange(1, n + 1)
        assert np.ptp(drift) < 8
