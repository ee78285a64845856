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
    running_max_M = rows_MD.new_full((rows_MD.shape[0],), lowest)
    running_sum_M = rows_MD.new_zeros(rows_MD.shape[0])
    best_M = torch.full_like(running_max_M, -1, dtype=torch.int64)
    scaled_MD = scale * rows_MD
    for begin in range(0, columns_GD.shape[0], tile):
        takes_part = valid_G[begin : begin + tile]
        if left_out is not None:
            takes_part = takes_part & ~left_out.tile(begin, tile)
        # A finite floor, not -inf: the difference of two -inf would be NaN.
        scores_MT = (scaled_MD @ columns_GD[begin : begin + tile].T).masked_fill_(~takes_part, lowest)
        tile_max_M, tile_best_M = scores_MT.max(dim=1)
        best_M = torch.where(tile_max_M > running_max_M, tile_best_M + begin, best_M)
        new_max_M = torch.maximum(running_max_M, tile_max_M)
        weights_MT = scores_MT.sub_(new_max_M[:, None]).exp_().mul_(takes_part)
        running_sum_M = running_sum_M * (running_max_M - new_max_M).exp() + weights_MT.sum(dim=1)
        running_max_M = new_max_M
    return running_max_M + running_sum_M.log(), best_M


def streamed_gradient(
    rows: tuple[Tensor, Tensor, Tensor],
    columns: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    tile: int,
    left_out: LeftOut | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what the gradients need: attention of rows over columns, in both directions, and expected similarities.

    With P_ij = exp(z_ij - lse_row_i), Q_ij = exp(z_ij - lse_column_j), both 0 unless row and column are valid
    and the column is not left out of the row,

        pull_i = sum_j (P_ij + Q_ij) c_j,    expected_i = sum_j P_ij (r_i . c_j).

    Then dloss/dr_i = s/2 (pull_i - 2 p_i) with p_i the row's positive, and dloss/ds is the sum over both
    directions of (expected_i - r_i . p_i) / 2.

    Args:
        rows: features (M, D), log-sum-exp (M,) and validity (M,) bool of the rows.
        columns: features (G, D), log-sum-exp (G,) and validity (G,) bool of the columns; the log-sum-exp of a
            column runs over all rows of all ranks. Where a slot is not valid, any finite log-sum-exp will do.
        scale: () same dtype, s.
        tile: columns T that exist at one time.
        left_out: as in ``streamed_lse``; it is symmetric, so it says of a column's sum too what it leaves out.

    Returns:
        pull (M, D) and expected (M,) of the same dtype, 0 for rows that are not valid.
    """
    rows_MD, row_lse_M, row_valid_M = rows
    columns_GD, column_lse_G, column_valid_G = columns
    pull_MD = torch.zeros_like(rows_MD)
    expected_M = torch.zeros_like(row_lse_M)
    for begin in range(0, columns_GD.shape[0], tile):
        part = slice(begin, begin + tile)
        columns_TD = columns_GD[part]
        similarity_MT = rows_MD @ columns_TD.T
        valid_MT = row_valid_M[:, None] & column_valid_G[part]
        if left_out is not None:
            valid_MT &= ~left_out.tile(begin, tile)
        scores_MT = (scale * similarity_MT).masked_fill_(~valid_MT, -torch.inf)
        weights_MT = (scores_MT - row_lse_M[:, None]).exp_()
        expected_M += (weights_MT * similarity_MT).sum(dim=1)
        weights_MT += (scores_MT - column_lse_G[part]).exp_()
        pull_MD.addmm_(weights_MT, columns_TD)
    return pull_MD, expected_M
