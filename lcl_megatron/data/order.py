"""Randomness without state: every random decision of the data path is a hash of what it decides about.

The hash is splitmix64's finaliser (Steele et al., OOPSLA 2014) chained over 64-bit words, modulo 2**64::

    mix(x)           = x ^= x >> 30; x *= 0xBF58476D1CE4E5B9; x ^= x >> 27; x *= 0x94D049BB133111EB; x ^ x >> 31
    hash(v1, v2, ..) = h = 0; for v in v1, v2, ..: h = mix(h + (v + 1) * 0x9E3779B97F4A7C15)

It uses integers only, so the order of a run is the same on every platform and under every version of numpy.
``model/drop_path.py`` has the same finaliser for tensors, because its decisions are made on the device.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = (1 << 64) - 1
NUM_ROUNDS = 6
"""Feistel rounds of a permutation; from 4 on, one with a good round function passes for random (Luby and Rackoff)."""


class Stream(IntEnum):
    """What a random number decides. Decisions in different streams are independent of each other."""

    DOCUMENT_ORDER = 1
    """Which of the documents that could stand in a row stands there."""
    ROW_ORDER = 2
    """Place of a row in its epoch."""
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


def permute(positions: np.ndarray, sizes: np.ndarray | int, keys: np.ndarray | int) -> np.ndarray:
    """Return elements of keyed permutations of range(size), computed where they are asked for, in O(1) memory.

    A Feistel network over pairs (left, right) of digits to the base ceil(sqrt(size)): each round maps (left, right)
    to (right, left + hash(right)) and is invertible. The at most 2 sqrt(size) + 1 values behind the size are mapped
    again until they fall below it (cycle walking), which keeps the map a bijection of range(size).

    Args:
        positions: (k,) integers, each below its size.
        sizes: (k,) int64 or one for all, below 2**52: how many elements the permutation has.
        keys: (k,) uint64 or one for all: which permutation, e.g. ``keyed_hash(seed, Stream.ROW_ORDER, epoch)``.

    Returns:
        (k,) int64.

    Raises:
        IndexError: If a position is negative or not below its size.
    """
    positions = np.asarray(positions, dtype=np.int64)
    sizes = np.broadcast_to(np.asarray(sizes, dtype=np.int64), positions.shape)
    outside = np.flatnonzero((positions < 0) | (positions >= sizes))
    if outside.size:
        raise IndexError(f"position {positions[outside[0]]} of a permutation of {sizes[outside[0]]} elements")
    limits = sizes.astype(np.uint64)
    bases = np.sqrt(np.maximum(sizes - 1, 0)).astype(np.uint64) + np.uint64(1)
    round_keys = [np.broadcast_to(keyed_hash(np.asarray(keys), i), positions.shape) for i in range(NUM_ROUNDS)]
    values = _encrypt(positions.astype(np.uint64), bases, round_keys)
    walking = np.flatnonzero(values >= limits)
    while walking.size:
        values[walking] = _encrypt(values[walking], bases[walking], [keys[walking] for keys in round_keys])
        walking = walking[values[walking] >= limits[walking]]
    return values.astype(np.int64)


def _encrypt(values: np.ndarray, bases: np.ndarray, round_keys: list[np.ndarray]) -> np.ndarray:
    left, right = np.divmod(values, bases)
    with np.errstate(over="ignore"):
        for keys in round_keys:
            left, right = right, (left + _mix(right + keys) % bases) % bases
    return left * bases + right


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
