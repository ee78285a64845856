"""Oracles: published outputs of splitmix64 for seed 0, set equality, a chi-square bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.data.order import Stream, keyed_hash, keyed_uniforms, permute

GOLDEN_HASH = 0x8C98D56AFDC6CBA0
GOLDEN_PERMUTATION = [9, 6, 5, 8, 1, 4, 0, 3, 7, 2]


def test_hash_of_one_integer_is_splitmix64_of_seed_0() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [int(keyed_hash(i)) for i in range(4)] == published


def test_hash_is_the_same_for_integers_arrays_and_mixtures() -> None:
    rows = np.array([[3, -1, 7], [2**62, 0, 5]])
    expected = [[int(keyed_hash(9, 4, int(v), 2)) for v in row] for row in rows]
    assert keyed_hash(9, 4, rows, 2).tolist() == expected
    assert keyed_hash(9, np.array([4]), rows, np.uint64(2)[None]).tolist() == expected
    assert len(set(keyed_hash(1, np.arange(1000), 2).tolist())) == 1000


def test_hash_golden_values_never_change() -> None:
    """Changing them would change the data order of every run that is resumed."""
    assert int(keyed_hash(1234, Stream.DOCUMENT_ORDER, 0)) == GOLDEN_HASH
    assert permute(np.arange(10), 10, 1).tolist() == GOLDEN_PERMUTATION


def test_uniforms_are_uniform_and_keyed() -> None:
    values = np.array([keyed_uniforms(4, 1, Stream.CROP, key) for key in range(5000)])
    assert values.min() >= 0
    assert values.max() < 1
    # 3 standard errors of the mean of 5,000 uniforms is 0.0123; of a correlation, 0.043.
    np.testing.assert_allclose(values.mean(axis=0), 0.5, atol=0.0123)
    np.testing.assert_allclose(np.corrcoef(values.T), np.eye(4), atol=0.043)
    assert keyed_uniforms(2, 1, 2) == keyed_uniforms(4, 1, 2)[:2]


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, np.uint64(key))), np.arange(n))


def test_permutation_of_part_is_part_of_permutation() -> None:
    whole = permute(np.arange(100_003), 100_003, 5)
    places = np.array([99_999, 0, 17, 50_000])
    assert np.array_equal(permute(places, 100_003, 5), whole[places])


def test_many_permutations_at_once_equal_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    sizes, keys = rng.integers(1, 50, 500), rng.integers(0, 2**63, 500)
    positions = rng.integers(0, sizes)
    alone = [int(permute(np.array([p]), int(n), int(k))[0]) for p, n, k in zip(positions, sizes, keys, strict=True)]
    assert permute(positions, sizes, keys).tolist() == alone


def test_permutation_of_a_hundred_million_needs_no_memory() -> None:
    values = permute(np.arange(70_000_000, 70_001_000), 100_000_000, 3)
    assert len(np.unique(values)) == 1000
    assert values.max() < 100_000_000


def test_permutation_mixes_well() -> None:
    """Neighbours go anywhere: 64 x 64 counts of (position, value) are Poisson, chi-square within 5 sigma."""
    n = 64 * 64 * 16
    for key in range(3):
        values = permute(np.arange(n), n, key)
        counts, _, _ = np.histogram2d(np.arange(n), values, bins=64)
        degrees = 63 * 63
        chi_square = float(((counts - 16) ** 2 / 16).sum())
        assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5
    assert (permute(np.arange(n), n, 0) == permute(np.arange(n), n, 1)).sum() < 20


def test_permutation_refuses_positions_outside() -> None:
    with pytest.raises(IndexError, match="position 5 of a permutation of 5 elements"):
        permute(np.array([0, 5]), 5, 0)
    with pytest.raises(IndexError, match="position -1 of a permutation of 7 elements"):
        permute(np.array([0, -1]), np.array([3, 7]), 0)
