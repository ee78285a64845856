"""The model's view of a sequence that may be split over ranks.

The model calls these few methods wherever a sequence is split or a position of it is read; what they do on several
ranks is in ``parallel/sequence.py``. Readers of the model and single-process tests meet only ``WholeSequence``.

Shape letters: T tokens of a flattened sequence, C width, K picked rows.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SequenceEdge(Protocol):
    """Where a flattened sequence (T, 1, C) enters and leaves the layers that may hold only a part of it."""

    @property
    def multiple(self) -> int:
        """T must be a multiple of this; towers pad up to it."""
        ...

    def scatter(self, hidden_T1C: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that every rank holds whole."""
        ...

    def gather(self, hidden_T1C: Tensor) -> Tensor:
        """Return the whole tensor on every rank, for modules that every rank computes alike."""
        ...

    def shard(self, values_T: Tensor) -> Tensor:
        """Return this rank's entries of a constant (no gradient) per-token vector."""
        ...

    def pick_rows(self, hidden_T1C: Tensor, positions_K: Tensor) -> Tensor:
        """Return rows (K, C) at flat positions of the whole sequence, on every rank."""
        ...


class WholeSequence:
    """A sequence that is not split: one process, or tensor parallelism without sequence parallelism."""

    multiple = 1

    def scatter(self, hidden_T1C: Tensor) -> Tensor:
        """Return the input."""
        return hidden_T1C

    def gather(self, hidden_T1C: Tensor) -> Tensor:
        """Return the input."""
        return hidden_T1C

    def shard(self, values_T: Tensor) -> Tensor:
        """Return the input."""
        return values_T

    def pick_rows(self, hidden_T1C: Tensor, positions_K: Tensor) -> Tensor:
        """Return rows (K, C) of ``hidden`` at ``positions``."""
        return hidden_T1C[:, 0].index_select(0, positions_K)
