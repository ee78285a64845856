"""Symmetric InfoNCE, streamed over tiles of columns so that the similarity matrix never exists at once.

With unit features x_i (images) and y_j (contexts), scale s and z_ij = s x_i . y_j, over the valid slots only,

    loss  = sum_i [(lse_x_i - z_ii) + (lse_y_i - z_ii)] / 2
    lse_x_i = log sum_j exp(z_ij),    lse_y_j = log sum_i exp(z_ij).

Both directions are the same computation with x and y exchanged, so each function here takes *rows* (features whose
statistics are wanted) and *columns* (the features that they are compared with). Everything is exact: a tile only
decides how many columns exist at one time.

Columns that show the same as a row may be left out of its sums (``losses/false_negatives.py``): they count neither as
negatives nor as positives. A row's own column always stays, so no sum is empty.

Shape letters: M rows, G columns, T columns of one tile, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcl_megatron.losses.false_negatives import LeftOut


def streamed_lse(
    rows_MD: Tensor,
    columns_GD: Tensor,
    valid_G: Tensor,
    scale: Tensor,
    tile: int,
    left_out: LeftOut | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of each row's scores over the columns that take part, and the best of them.

        lse_i = log sum_j exp(s r_i . c_j),    best_i = argmax_j r_i . c_j,    j valid and not left out of row i

    Args:
        rows_MD: (M, D) float32 or float64, unit rows.
        columns_GD: (G, D), same dtype, unit rows.
        valid_G: (G,) bool; other columns do not take part.
        scale: () same dtype, s (not its log).
        tile: columns T that exist at one time.
        left_out: columns that take no part in a row; None = none.

    Returns:
        lse (M,) of the same dtype, -inf if no column takes part; best column (M,) int64, -1 if none does.
    """
    lowest = torch.finfo(rows_MD.dtype).min
    num_rows = rows_MD.shape[0]
    max_M = rows_MD.new_full((num_rows,), lowest)
    sum_M = rows_MD.new_zeros(num_rows)
    best_M = torch.full_like(max_M, -1, dtype=torch.int64)
    scaled_MD = scale * rows_MD
    block = _rows_of_block(rows_MD)
    scores = rows_MD.new_empty(min(block, num_rows) * min(tile, columns_GD.shape[0]))
    for begin in range(0, columns_GD.shape[0], tile):
        columns_TD = columns_GD[begin : begin + tile]
        excluded = _excluded(valid_G, left_out, (begin, tile), num_rows)
        for first in range(0, num_rows, block):
            in_block = slice(first, first + block)
            # A finite floor, not -inf: the difference of two -inf would be NaN.
            scores_MT = _product(scaled_MD[in_block], columns_TD, scores).masked_fill_(excluded[in_block], lowest)
            tile_max_M, tile_best_M = scores_MT.max(dim=1)
            best_M[in_block] = torch.where(tile_max_M > max_M[in_block], tile_best_M + begin, best_M[in_block])
            new_max_M = torch.maximum(max_M[in_block], tile_max_M)
            # While no column is valid, each adds exp(0); what it adds is gone with the first valid one.
            tile_sum_M = scores_MT.sub_(new_max_M[:, None]).exp_().sum(dim=1)
            sum_M[in_block] = sum_M[in_block] * (max_M[in_block] - new_max_M).exp() + tile_sum_M
            max_M[in_block] = new_max_M
    return (max_M + sum_M.log()).masked_fill_(best_M < 0, -torch.inf), best_M


def streamed_gradient(
    rows: tuple[Tensor, Tensor, Tensor],
    columns: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    tile: int,
    left_out: LeftOut | None = None,
) -> Tensor:
    """Return what the gradients need: what rows are pulled to, by their own attention and by that of the columns.

    With P_ij = exp(z_ij - lse_row_i), Q_ij = exp(z_ij - lse_column_j), both 0 unless row and column are valid
    and the column is not left out of the row,

        pull_i = sum_j (P_ij + Q_ij) c_j.

    Then dloss/dr_i = s/2 (pull_i - 2 p_i) with p_i the row's positive. With both directions' rows of all ranks,
    sum_i r_i . pull_i is twice the sum of all expected similarities, so that dloss/ds is the sum over both directions
    and all rows of r_i . (pull_i / 4 - p_i / 2): no further look at the matrix is needed.

    Args:
        rows: features (M, D), log-sum-exp (M,) and validity (M,) bool of the rows.
        columns: features (G, D), log-sum-exp (G,) and validity (G,) bool of the columns; the log-sum-exp of a
            column runs over all rows of all ranks. Where a slot is not valid, any finite log-sum-exp will do.
        scale: () same dtype, s.
        tile: columns T that exist at one time.
        left_out: as in ``streamed_lse``; it is symmetric, so it says of a column's sum too what it leaves out.

    Returns:
        pull (M, D) of the same dtype, 0 for rows that are not valid.
    """
    rows_MD, row_lse_M, row_valid_M = rows
    columns_GD, column_lse_G, column_valid_G = columns
    pull_MD = torch.zeros_like(rows_MD)
    num_rows = rows_MD.shape[0]
    scaled_MD = scale * rows_MD
    block = _rows_of_block(rows_MD)
    size = min(block, num_rows) * min(tile, columns_GD.shape[0])
    scores, weights = rows_MD.new_empty(size), rows_MD.new_empty(size)
    for begin in range(0, columns_GD.shape[0], tile):
        in_tile = slice(begin, begin + tile)
        columns_TD, column_lse_T = columns_GD[in_tile], column_lse_G[in_tile]
        excluded = _excluded(column_valid_G, left_out, (begin, tile), num_rows)
        for first in range(0, num_rows, block):
            in_block = slice(first, first + block)
            scores_MT = _product(scaled_MD[in_block], columns_TD, scores).masked_fill_(excluded[in_block], -torch.inf)
            weights_MT = weights[: scores_MT.numel()].view(scores_MT.shape)
            torch.sub(scores_MT, row_lse_M[in_block, None], out=weights_MT).exp_()
            weights_MT += scores_MT.sub_(column_lse_T).exp_()
            pull_MD[in_block].addmm_(weights_MT, columns_TD)
    return pull_MD.masked_fill_(~row_valid_M[:, None], 0.0)


def _excluded(valid_G: Tensor, left_out: LeftOut | None, tile: tuple[int, int], num_rows: int) -> Tensor:
    """Return which columns of a tile (its begin and its size) take no part, (M, T) bool, read only."""
    begin, size = tile
    invalid_T = ~valid_G[begin : begin + size]
    return invalid_T.expand(num_rows, -1) if left_out is None else left_out.tile(begin, size).logical_or_(invalid_T)


_CPU_BLOCK = 512
"""Rows whose scores exist at one time on a CPU, so that what is done to them is done in its cache."""


def _rows_of_block(rows_MD: Tensor) -> int:
    """Return how many rows are worked on at one time; a GPU is only kept busy by all of them."""
    return _CPU_BLOCK if rows_MD.device.type == "cpu" else max(1, rows_MD.shape[0])


def _product(rows_MD: Tensor, columns_TD: Tensor, buffer: Tensor) -> Tensor:
    """Return all dot products (M, T), in memory that is used again and again: fresh pages cost a fault each."""
    num_rows, num_columns = rows_MD.shape[0], columns_TD.shape[0]
    return torch.mm(rows_MD, columns_TD.T, out=buffer[: num_rows * num_columns].view(num_rows, num_columns))
