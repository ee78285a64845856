"""Stochastic depth from a hash. Oracles: golden values, the published generator, the formula in Python's
integers; a sort of Python's integers; the binomial distribution; closed forms.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.config import VisionConfig
from lcl_megatron.model.drop_path import DropPath, keyed_uniform
from lcl_megatron.model.drop_rates import computed_share

MASK = (1 << 64) - 1
KEYS = torch.arange(1, 20_001, dtype=torch.int64)


def _hash_by_hand(key: int, *context: int) -> int:
    """splitmix64 on Python's integers."""
    x = key & MASK
    for value in context:
        x = (x + (value + 1) * 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
        x ^= x >> 31
    return x


def _mix_by_hand(key: int, *context: int) -> float:
    return (_hash_by_hand(key, *context) >> 40) / (1 << 24)


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


@pytest.mark.parametrize(("layer", "branch"), [(1, 0), (1, 1), (3, 0), (3, 1)])
def test_a_subset_is_the_images_with_the_largest_numbers(layer: int, branch: int) -> None:
    keys = torch.randint(-(2**62), 2**62, (50,), generator=torch.Generator().manual_seed(0))
    path = DropPath(rate=0.5, num_layers=4, seed=6, step=8)
    numbers = [_hash_by_hand(key, 6, 8, 2 * layer + branch) for key in keys.tolist()]
    num_kept = {1: 42, 3: 25}[layer]  # 50 x (1 - 1/6) = 41.7, 50 x 1/2
    expected = sorted(sorted(range(50), key=lambda place: -numbers[place])[:num_kept])
    assert path.num_kept(50, layer) == num_kept
    assert path.subset(keys, layer, branch).tolist() == expected


def test_subsets_never_change() -> None:
    """A resumed run of a later version must drop what an earlier one would have dropped."""
    subset = DropPath(rate=0.5, num_layers=3, seed=1234, step=7).subset(torch.arange(1, 17), layer=2, branch=1)
    assert subset.tolist() == [1, 4, 5, 8, 9, 10, 13, 14]


def test_a_subset_depends_on_the_keys_and_not_on_their_places() -> None:
    path = DropPath(rate=0.4, num_layers=4, seed=5, step=9)
    keys = KEYS[:31]
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0))
    kept = keys[path.subset(keys, 3, 1)]
    assert torch.equal(keys[order][path.subset(keys[order], 3, 1)].sort().values, kept)


def test_every_image_is_kept_as_often_as_its_scale_says() -> None:
    """Over many steps, each of 5 images is in a subset of 3 in 3 steps of 5: times 5 / 3, the mean is 1."""
    subsets = [DropPath(0.4, 2, seed=1, step=step).subset(KEYS[:5], 1, 0) for step in range(4000)]
    shares = torch.bincount(torch.cat(subsets), minlength=5) / 4000
    assert float((shares - 0.6).abs().max()) < 4 * (0.6 * 0.4 / 4000) ** 0.5


def test_every_coordinate_of_a_subset_matters() -> None:
    keys = KEYS[:400]

    def subset(seed: int = 1, step: int = 2, layer: int = 3, branch: int = 0) -> set[int]:
        return set(DropPath(0.5, layer + 1, seed, step).subset(keys, layer, branch).tolist())

    subsets = [subset(), subset(seed=2), subset(step=3), subset(layer=4), subset(branch=1), subset(seed=2, step=1)]
    for i, one in enumerate(subsets):
        for other in subsets[:i]:
            # Hypergeometric: mean 100, deviation 5.
            assert abs(len(one & other) - 100) < 20


def test_a_subset_of_all_is_none_and_one_image_is_always_kept() -> None:
    path = DropPath(rate=0.4, num_layers=3, seed=1, step=2)
    assert path.subset(KEYS, 0, 0) is None
    # 0.2 x 2 = 0.4 images, and 0.4 x 1, round to none; 0.2 x 3 = 0.6 to one.
    assert path.subset(KEYS[:2], 1, 0) is None
    assert path.subset(KEYS[:1], 2, 0) is None
    assert len(path.subset(KEYS[:3], 1, 0)) == 2
    assert DropPath(rate=0.99, num_layers=2, seed=1, step=2).subset(KEYS[:1], 1, 0) is None
    assert len(DropPath(rate=0.99, num_layers=2, seed=1, step=2).subset(KEYS[:9], 1, 0)) == 1


def test_equal_keys_are_kept_in_the_order_of_their_places() -> None:
    assert DropPath(0.5, 2, seed=1, step=2).subset(torch.full((40,), 7), 1, 0).tolist() == list(range(20))


def test_share_of_computed_branches_falls_with_depth_in_subset_mode_only() -> None:
    vision = VisionConfig(num_layers=5, drop_path_rate=0.2, drop_path_mode="subset")
    assert [computed_share(vision, layer) for layer in range(5)] == pytest.approx([1.0, 0.95, 0.9, 0.85, 0.8])
    assert computed_share(VisionConfig(num_layers=5, drop_path_rate=0.2), 4) == 1.0
