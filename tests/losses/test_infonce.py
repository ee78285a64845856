"""Streamed InfoNCE. Oracle: the full similarity matrix in float64, with torch's own logsumexp, softmax and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_megatron.losses.false_negatives import LeftOut, find_classes
from lcl_megatron.losses.infonce import streamed_gradient, streamed_lse

SCALE = torch.tensor(14.0, dtype=torch.float64)


def _unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def _mask(size: int, seed: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.7


@pytest.mark.parametrize("tile", [1, 3, 10, 64])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(7, 10), (1, 1), (0, 5)])
def test_lse_when_columns_are_masked_equals_full_matrix(num_rows, num_columns, tile):
    rows, columns, valid = _unit(num_rows, 0), _unit(num_columns, 1), _mask(num_columns, 2)
    valid[0] = True
    scores = (SCALE * rows @ columns.T).masked_fill(~valid, -torch.inf)
    lse, best = streamed_lse(rows, columns, valid, SCALE, tile)
    torch.testing.assert_close(lse, scores.logsumexp(1), rtol=1e-12, atol=0)
    assert best.tolist() == (scores.argmax(1).tolist() if num_rows else [])


@pytest.mark.parametrize("num_columns", [0, 4])
def test_lse_when_no_column_is_valid_is_minus_infinity(num_columns):
    rows, columns = _unit(3, 0), _unit(num_columns, 1)
    lse, best = streamed_lse(rows, columns, torch.zeros(num_columns, dtype=torch.bool), SCALE, 2)
    assert lse.tolist() == [-torch.inf] * 3
    assert best.tolist() == [-1] * 3


def test_lse_when_scores_are_huge_stays_finite():
    """exp(1000) overflows even float64; the running maximum must not. Closed form: 1000 + ln 3."""
    rows = torch.ones(1, 1, dtype=torch.float64)
    columns = torch.tensor([[-1.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    for tile in (1, 2, 4):
        lse, best = streamed_lse(rows, columns, torch.ones(4, dtype=torch.bool), torch.tensor(1e3).double(), tile)
        assert lse.item() == pytest.approx(1000 + torch.tensor(3.0).double().log().item(), rel=1e-15)
        assert best.item() == 1


@pytest.mark.parametrize("tile", [1, 3, 9, 64])
def test_gradient_when_slots_are_masked_equals_softmax_of_full_matrix(tile):
    rows, columns = _unit(9, 0), _unit(9, 1)
    valid = _mask(9, 4)
    assert 1 < valid.sum() < 9
    similarity = rows @ columns.T
    scores = (SCALE * similarity).masked_fill(~(valid[:, None] & valid), -torch.inf)
    over_columns = scores.softmax(1).nan_to_num(0)  # a row without valid column is all NaN
    over_rows = scores.softmax(0).nan_to_num(0)
    row_lse, column_lse = (scores.logsumexp(dim).masked_fill(~valid, 0.0) for dim in (1, 0))
    pull = streamed_gradient((rows, row_lse, valid), (columns, column_lse, valid), SCALE, tile)
    torch.testing.assert_close(pull, (over_columns + over_rows) @ columns, rtol=1e-12, atol=1e-14)
    assert not pull[~valid].any()


# The rows are the slots from 2 on of nine; columns that share a class with a row are left out of it.
CLASSES = find_classes(torch.tensor([1, 2, 1, 3, 2, 1, 4, 3, 1]))
FIRST, ROWS = 2, 6


def _left_out_matrix() -> Tensor:
    same = CLASSES.ids_G[:, None] == CLASSES.ids_G
    return same & ~torch.eye(9, dtype=torch.bool)


@pytest.mark.parametrize("tile", [1, 2, 4, 9, 64])
def test_lse_when_columns_are_left_out_equals_full_matrix(tile):
    rows, columns, valid = _unit(9, 0), _unit(9, 1), _mask(9, 4)
    own = slice(FIRST, FIRST + ROWS)
    scores = (SCALE * rows @ columns.T).masked_fill(~valid | _left_out_matrix(), -torch.inf)[own]
    lse, best = streamed_lse(rows[own], columns, valid, SCALE, tile, LeftOut((CLASSES,), FIRST, ROWS))
    torch.testing.assert_close(lse, scores.logsumexp(1), rtol=1e-12, atol=0)
    assert best.tolist() == scores.argmax(1).tolist()


@pytest.mark.parametrize("tile", [1, 2, 4, 9, 64])
def test_gradient_when_columns_are_left_out_equals_softmax_of_full_matrix(tile):
    rows, columns, valid = _unit(9, 0), _unit(9, 1), _mask(9, 4)
    own = slice(FIRST, FIRST + ROWS)
    assert 1 < valid[own].sum() < ROWS
    similarity = rows @ columns.T
    scores = (SCALE * similarity).masked_fill(~(valid[:, None] & valid) | _left_out_matrix(), -torch.inf)
    over_columns, over_rows = scores.softmax(1).nan_to_num(0), scores.softmax(0).nan_to_num(0)
    row_lse, column_lse = (scores.logsumexp(dim).masked_fill(~valid, 0.0) for dim in (1, 0))
    pull = streamed_gradient(
        (rows[own], row_lse[own], valid[own]),
        (columns, column_lse, valid),
        SCALE,
        tile,
        LeftOut((CLASSES,), FIRST, ROWS),
    )
    torch.testing.assert_close(pull, ((over_columns + over_rows) @ columns)[own], rtol=1e-12, atol=1e-14)
