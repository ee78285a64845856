"""Randomness without state: every random decision of the data path is a hash of what it decides about.

The hash is splitmix64's finaliser (Steele et al., OOPSLA 2014) chained over 64-bit words, modulo 2**64::

    mix(x)           = x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^ x >> 31
    hash(v1, v2, ..) = h = 0; for v in v1, v2, ..: h = mix(h + (v + 1) * 0x9E3779B97F4A7C15)

It uses integers only, so the order of a run is the same on every platform and under every version of numpy.
``model/drop_path.py`` has the same finaliser for tensors, because its decisions are made on the device.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = (1 << 64) - 1
NUM_ROUNDS = 6
"""Feistel rounds of a permutation; from 4 on, one with a good round function passes for random (Luby and Rackoff)."""
BITS_PER_WORD = 64


class Stream(IntEnum):
    """What a random number decides. Decisions in different streams are independent of each other."""

    DOCUMENT_ORDER = 1
    """Place of a document in its epoch."""
    ROW_ORDER = 2
    """Place of a packed row in its window."""
    SENTENCE_IMAGE = 3
    """Which of the images of one sentence stays."""
    IMAGE_CHOICE = 4
    """Which images of a document stay."""
    PLACEMENT = 5
    """Before or after the sentence."""
    CROP = 6
    """The random crop."""


def keyed_hash(*values: int | np.ndarray) -> np.ndarray:
    """Return the 64-bit hash of a tuple of integers, or of many tuples at once.

    Args:
        values: Integers or integer arrays that broadcast together; negative ones count modulo 2**64.

    Returns:
        uint64 of the broadcast shape; () for integers only.
    """
    scalar, rest = 0, 0
    for rest, value in enumerate(values):  # noqa: B007 - counts the leading integers, which need no array
        if isinstance(value, np.ndarray):
            break
        scalar = _mix_int(scalar + (int(value) + 1) * GOLDEN)
    else:
        return np.array(scalar, dtype=np.uint64)
    mixed = np.array(scalar, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for value in values[rest:]:
            word = np.asarray(value).astype(np.uint64) if isinstance(value, np.ndarray) else np.uint64(value & MASK_64)
            mixed = _mix(mixed + (word + np.uint64(1)) * np.uint64(GOLDEN))
    return mixed


def keyed_uniforms(count: int, *values: int) -> list[float]:
    """Return ``count`` numbers in [0, 1) with 53 random bits each, a pure function of ``values``."""
    key = int(keyed_hash(*values))
    return [(_mix_int(key + (index + 1) * GOLDEN) >> 11) / (1 << 53) for index in range(count)]


class Permutation:
    """A keyed permutation of range(n) that is computed where it is asked for, in O(1) memory.

    A Feistel network over pairs (left, right) of digits to the base ceil(sqrt(n)): each round maps (left, right) to
    (right, left + hash(right)) and is invertible. The at most 2 sqrt(n) + 1 values behind n are mapped again until
    they fall below it (cycle walking), which keeps the map a bijection of range(n).

    Args:
        n: Number of elements, at least 1.
        key: Chooses the permutation, e.g. ``int(keyed_hash(seed, Stream.DOCUMENT_ORDER, epoch))``.
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} elements does not exist; n must be at least 1")
        self.n = n
        """Number of elements."""
        self._base = np.uint64(math.isqrt(n - 1) + 1)
        self._round_keys = [np.uint64(keyed_hash(key, index)) for index in range(NUM_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the elements at some positions.

        Args:
            positions: Integers in [0, n), any shape.

        Returns:
            int64 of the same shape.

        Raises:
            IndexError: If a position is outside [0, n).
        """
        positions = np.asarray(positions)
        if positions.size and not (0 <= positions.min() and positions.max() < self.n):
            raise IndexError(f"positions from {positions.min()} to {positions.max()} of a permutation of {self.n}")
        values = self._encrypt(positions.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(values >= np.uint64(self.n))
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= np.uint64(self.n)]
        return values.astype(np.int64).reshape(positions.shape)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = np.divmod(values, self._base)
        with np.errstate(over="ignore"):
            for key in self._round_keys:
                left, right = right, (left + _mix(right + key) % self._base) % self._base
        return left * self._base + right


class IndexSet:
    """A fixed subset of range(n) that finds its k-th element; 2 bits per element of the range.

    Args:
        member: (n,) bool.
    """

    def __init__(self, member: np.ndarray) -> None:
        padded = np.zeros(-(-len(member) // BITS_PER_WORD) * BITS_PER_WORD, dtype=bool)
        padded[: len(member)] = member
        self._words = np.packbits(padded, bitorder="little").reshape(-1, BITS_PER_WORD // 8)
        self._ends = np.cumsum(np.bitwise_count(self._words).sum(axis=1, dtype=np.int64))
        self.size = int(self._ends[-1]) if len(self._ends) else 0
        """Number of elements."""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, ranks: np.ndarray) -> np.ndarray:
        """Return the elements at ``ranks`` in ascending order; (k,) integers in [0, size) to (k,) int64."""
        word = np.searchsorted(self._ends, ranks, side="right")
        bits = np.unpackbits(self._words[word], axis=1, bitorder="little")
        before = self._ends[word] - bits.sum(axis=1, dtype=np.int64)
        count = np.cumsum(bits, axis=1, dtype=np.uint8)
        bit = np.argmax(count == (ranks - before + 1).astype(np.uint8)[:, None], axis=1)
        return word * BITS_PER_WORD + bit


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64, modulo 2**64; overflow warnings must be off."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(x: int) -> int:
    """``_mix`` of a Python integer."""
    x &= MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)
