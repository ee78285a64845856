"""Slots that show the same. Oracle: the full matrix of comparisons, and counts in dictionaries."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from lcl_megatron.losses.false_negatives import LeftOut, alone_unless, find_classes

CASES = {
    "all different": [5, 3, 9, 1, 0, 7, 2],
    "all equal": [4] * 7,
    "some equal": [1, 0, 1, 2, 0, 1, 2**62],
    "largest keys": [2**63 - 1, 2**63 - 2, 2**63 - 1, -(2**63), 0, -1, -(2**63)],
    "one": [3],
    "none": [],
}


def _keys(name: str) -> Tensor:
    return torch.tensor(CASES[name], dtype=torch.int64)


@pytest.mark.parametrize("name", CASES)
def test_classes_are_those_of_a_comparison_of_all_with_all(name: str) -> None:
    keys = _keys(name)
    classes = find_classes(keys)
    assert torch.equal(classes.ids_G[:, None] == classes.ids_G, keys[:, None] == keys)
    counts = Counter(CASES[name])
    assert classes.sizes_G.tolist() == [counts[key] for key in CASES[name]]
    assert all(0 <= number < len(keys) for number in classes.ids_G.tolist())


def test_slots_that_take_no_part_are_alone() -> None:
    keys = torch.tensor([4, 4, 4, 0, 0, 4])
    takes_part = torch.tensor([True, False, True, False, False, False])
    found = alone_unless(takes_part, keys)
    assert found[takes_part].tolist() == [4, 4]
    assert find_classes(found).sizes_G.tolist() == [2, 1, 2, 1, 1, 1]


def test_left_out_columns_are_those_of_the_matrix_in_any_tiles() -> None:
    generator = torch.Generator().manual_seed(0)
    images, contexts = (torch.randint(0, 6, (23,), generator=generator) for _ in range(2))
    same_image, same_context = (keys[:, None] == keys for keys in (images, contexts))
    for kinds, matrix in (
        ((images,), same_image),
        ((contexts,), same_context),
        ((images, contexts), same_image | same_context),
        ((images, images), same_image),
    ):
        matrix = matrix & ~torch.eye(23, dtype=torch.bool)
        assert matrix.any()
        for first, rows in ((0, 23), (0, 5), (9, 7), (22, 1), (4, 0)):
            left_out = LeftOut(tuple(find_classes(keys) for keys in kinds), first, rows)
            expected = matrix[first : first + rows]
            assert left_out.count().tolist() == expected.sum(dim=1).tolist()
            for size in (1, 4, 23, 100):
                tiles = [left_out.tile(begin, size) for begin in range(0, 23, size)]
                assert torch.equal(torch.cat(tiles, dim=1), expected)
