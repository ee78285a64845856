"""Sequence parallelism: activations between matrix products split over the tensor-parallel ranks.

Shape letters: T tokens of the whole flattened sequence (a local shard keeps the letter), C width, K picked rows.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from lcl_megatron.parallel.groups import ProcessGroups


class TensorParallelSequence:
    """``SequenceEdge`` over the tensor-parallel group: rank r of R holds rows [r T / R, (r + 1) T / R)."""

    def __init__(self, groups: ProcessGroups) -> None:
        self._group = groups.tp
        self._rank = groups.tp_rank
        self.multiple = groups.tp_size

    def scatter(self, hidden_T1C: Tensor) -> Tensor:
        """Return this rank's rows; backward: all-gather, so that what lies before stays replicated."""
        return scatter_to_sequence_parallel_region(hidden_T1C, group=self._group)

    def gather(self, hidden_T1C: Tensor) -> Tensor:
        """Return all rows; backward: take this rank's rows.

        What follows (the attention pool) is computed by every rank alike, so every rank already has the whole
        gradient; the default backward, a reduce-scatter, would count it once per rank.
        """
        return gather_from_sequence_parallel_region(hidden_T1C, tensor_parallel_output_grad=False, group=self._group)

    def shard(self, values_T: Tensor) -> Tensor:
        """Return this rank's entries of a per-token constant."""
        length = values_T.shape[0] // self.multiple
        return values_T[self._rank * length : (self._rank + 1) * length]

    def pick_rows(self, hidden_T1C: Tensor, positions_K: Tensor) -> Tensor:
        """Return rows (K, C) on every rank: the owner contributes a row, the others zeros, and the sum is taken.

        Backward: each rank keeps the gradient of the rows it owns. The gradient that arrives must be the same on
        every rank; a vocabulary-parallel product must therefore be entered through
        ``copy_to_tensor_model_parallel_region``.
        """
        length = hidden_T1C.shape[0]
        local_K = positions_K - self._rank * length
        owned_K1 = ((local_K >= 0) & (local_K < length))[:, None]
        rows_KC = hidden_T1C[:, 0].index_select(0, local_K.clamp(0, length - 1))
        return reduce_from_tensor_model_parallel_region(
            torch.where(owned_K1, rows_KC, torch.zeros((), dtype=rows_KC.dtype, device=rows_KC.device)),
            group=self._group,
        )
