"""Stochastic depth from a hash. Oracles: golden values, the published generator, the formula in Python's
integers; the binomial distribution; closed forms.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.model.drop_path import DropPath, keyed_uniform

MASK = (1 << 64) - 1
KEYS = torch.arange(1, 20_001, dtype=torch.int64)


def _mix_by_hand(key: int, *context: int) -> float:
    """splitmix64 on Python's integers."""
    x = key & MASK
    for value in context:
        x = (x + (value + 1) * 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
        x ^= x >> 31
    return (x >> 40) / (1 << 24)


def test_hash_of_one_round_is_splitmix64() -> None:
    """First outputs of the published generator with seed 0 and 1234567, upper 24 bits."""
    for seed, first in ((0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)):
        assert keyed_uniform(torch.tensor([seed]), 0).item() == (first >> 40) / 2**24


@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_hash_equals_formula_in_whole_numbers(key: int, context: list[int]) -> None:
    assert keyed_uniform(torch.tensor([key]), *context).item() == _mix_by_hand(key, *context)


def test_decisions_never_change() -> None:
    """A resumed run of a later version must drop what an earlier one would have dropped."""
    keep = DropPath(rate=0.5, num_layers=3, seed=1234, step=7).keep(torch.arange(1, 17), layer=2, branch=1)
    assert keep is not None
    assert "".join(str(int(value)) for value in keep) == "0200200022200220"


def test_decision_depends_on_the_key_and_not_on_its_place() -> None:
    path = DropPath(rate=0.3, num_layers=4, seed=5, step=9)
    whole = path.keep(KEYS, 3, 0)
    order = torch.randperm(len(KEYS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(path.keep(KEYS[order], 3, 0), whole[order])
    assert torch.equal(torch.cat([path.keep(part, 3, 0) for part in KEYS.split(77)]), whole)


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_share_of_dropped_branches_rises_linearly_with_depth(layer: int) -> None:
    rate = 0.4 * layer / 3
    keep = DropPath(rate=0.4, num_layers=4, seed=1, step=2).keep(KEYS, layer, 1)
    dropped = float((keep == 0).double().mean())
    deviation = (rate * (1 - rate) / len(KEYS)) ** 0.5
    assert abs(dropped - rate) < 4 * deviation
    # What is kept makes up for what is dropped.
    assert keep.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
    assert float(keep.double().mean()) == pytest.approx(1.0, abs=4 * deviation / (1 - rate))


def test_layer_without_rate_keeps_all_branches() -> None:
    assert DropPath(rate=0.4, num_layers=4, seed=1, step=2).keep(KEYS, 0, 0) is None
    assert DropPath(rate=0.0, num_layers=4, seed=1, step=2).keep(KEYS, 3, 0) is None
    assert DropPath(rate=0.4, num_layers=1, seed=1, step=2).keep(KEYS, 0, 0) is None


def test_every_coordinate_of_a_decision_matters_and_none_foretells_another() -> None:
    """Of two independent masks of rate 1/2, half of the entries agree."""

    def mask(seed: int = 1, step: int = 2, layer: int = 3, branch: int = 0) -> torch.Tensor:
        # The last of the layers, whatever its number, so that the rate is the same.
        return DropPath(0.5, layer + 1, seed, step).keep(KEYS, layer, branch) > 0

    masks = [mask(), mask(seed=2), mask(step=3), mask(layer=4), mask(branch=1), mask(seed=2, step=1)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            agree = float((one == other).double().mean())
            assert abs(agree - 0.5) < 4 * 0.5 / len(KEYS) ** 0.5


def test_numbers_are_uniform() -> None:
    numbers = keyed_uniform(KEYS, 3, 1).double()
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers, 20, 0, 1)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 43.8  # 99.9th percentile at 19 degrees of freedom
