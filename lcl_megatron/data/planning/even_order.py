"""Even orders: what differs alternates, so that every stretch of the whole holds the right share of each kind.

``EvenMerge`` merges streams. Stream c of rate r_c is given the times (2 j + 1) / (2 r_c) for its items j = 0, 1, ..;
the merged order is that of the times, among equals that of the streams. So after every n items stream c has given
n r_c / sum(r) of them, to within about one, and after sum(r) items exactly r_c: the order repeats with that period.

``even_step`` walks through a sorted list in steps of the golden section: item ``(step * k) mod n`` at place k. Any
stretch of places then samples all of the list evenly (a Kronecker sequence has the least discrepancy there is).

Both are computed where they are asked for, and not remembered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

TICK_BITS = 31
"""A period has 2**31 ticks of time, so that all products fit 64 bits."""

GOLDEN_SECTION = (5**0.5 - 1) / 2
STEP_CANDIDATES = 64
"""Steps that are looked at; the best has small partial quotients, as the golden section has ones only."""


def even_step(n: int) -> int:
    """Return a number below n, without a common divisor, whose multiples modulo n are spread evenly at every scale.

    Args:
        n: Length of the list, at least 1.
    """
    middle = round(n * GOLDEN_SECTION)
    near = range(max(1, middle - STEP_CANDIDATES), min(n, middle + STEP_CANDIDATES + 1))
    steps = [step for step in near if math.gcd(step, n) == 1]
    return min(steps, key=lambda step: (_largest_quotient(step, n), abs(step - middle)), default=1)


def _largest_quotient(a: int, b: int) -> int:
    """Return the largest partial quotient of the continued fraction of a / b behind the first."""
    largest = 0
    while a:
        quotient, rest = divmod(b, a)
        largest, a, b = max(largest, quotient), rest, a
    return largest


class EvenMerge:
    """The merged order of endless streams.

    Args:
        rates: Items that each stream gives per period, at least 0; their sum is from 1 to 2**31 - 1. Positions are
            below 2**32 periods.
    """

    def __init__(self, rates: Sequence[int] | np.ndarray) -> None:
        self.rates = np.asarray(rates, dtype=np.int64)
        """(streams,) int64."""
        if not self.rates.size or self.rates.min() < 0 or not 0 < self.rates.sum() < 1 << TICK_BITS:
            raise ValueError(f"rates {self.rates.tolist()[:10]}; expected 0 or more each, and a sum of 1 to 2**31 - 1")
        self.period = int(self.rates.sum())
        """Items after which the order repeats."""

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what stands at the positions [first, first + count) of the merged order.

        Returns:
            Stream of each, and its number within that stream, both (count,) int64.

        Raises:
            IndexError: If ``first`` is negative.
        """
        if first < 0:
            raise IndexError(f"position {first} of a merged order; positions are numbered from 0")
        num_streams = len(self.rates)
        # Counts at a time are right to half an item per stream, so these two times enclose the positions.
        begin, end = self._counts(first - num_streams), self._counts(first + count + num_streams)
        lengths = end - begin
        streams = np.repeat(np.arange(num_streams), lengths)
        numbers = np.arange(len(streams)) - np.repeat(np.cumsum(lengths) - lengths - begin, lengths)
        order = np.lexsort((streams, self._ticks(streams, numbers)))
        chosen = order[first - int(begin.sum()) :][:count]
        return streams[chosen], numbers[chosen]

    def _counts(self, position: int) -> np.ndarray:
        """Return how many items each stream has given before the time of a position, which may be negative."""
        periods, rest = divmod(max(0, position), self.period)
        ticks = (rest << TICK_BITS) // self.period
        # tick(j) < ticks  <=>  (2 j + 1) 2**31 < ticks 2 r  <=>  j < (2 ticks r - 2**31) / 2**32, rounded up
        half = np.int64(1 << TICK_BITS)
        given = -((half - 2 * ticks * self.rates) // (2 * half))
        return periods * self.rates + np.maximum(given, 0)

    def _ticks(self, streams: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        rates = self.rates[streams]
        periods, rest = np.divmod(numbers, rates)
        return (periods << TICK_BITS) + ((2 * rest + 1) << TICK_BITS) // (2 * rates)
