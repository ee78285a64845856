"""The model's view of rows whose positions and images may be shared by several ranks.

Context parallelism gives each rank some positions of every row and some images of every micro-batch. The model calls
these few methods where it goes from a micro-batch to what this rank computes of it, and back; what they do on several
ranks is in ``parallel/context.py``. Readers of the model and single-process tests meet only ``WholeRows``.

A flat position is always one of the whole rows (see ``data/batch.py``), on every rank.

Shape letters: B rows, S positions, T positions that this rank holds, K or J some flat positions, N images, L latents
per image, H language width, D feature width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from lcl_megatron.model.attention import PackedSequences

if TYPE_CHECKING:
    from lcl_megatron.data.batch import PackedBatch


class RowEdge(Protocol):
    """Where a micro-batch is divided over ranks, and where what they computed of it comes together."""

    def part(self, batch: PackedBatch) -> PackedBatch:
        """Return what this rank computes of a micro-batch; on the host, before it goes to the device."""
        ...

    def own(self, values_BS: Tensor) -> Tensor:
        """Return the entries (B, T / B) of a constant at the positions that this rank holds."""
        ...

    def local(self, positions_K: Tensor) -> Tensor:
        """Return where this rank holds flat positions; of a position that it does not hold, any row that it holds."""
        ...

    def place(self, hidden_TH: Tensor, rows_JH: Tensor, positions_J: Tensor) -> Tensor:
        """Return ``hidden`` with ``rows`` at those of their flat positions that this rank holds."""
        ...

    def sequences(self, batch: PackedBatch) -> PackedSequences:
        """Return what this rank's positions attend to."""
        ...

    def gather_latents(self, latents_NLH: Tensor, num_slots: int) -> Tensor:
        """Return all images' latents from those that this rank encoded; each rank reads others of them."""
        ...

    def gather_pooled(self, pooled_ND: Tensor, num_slots: int) -> Tensor:
        """Return all images' global latents from those that this rank encoded; every rank contrasts all alike."""
        ...

    def of_holders(self, features_ND: Tensor, positions_N: Tensor) -> Tensor:
        """Return on every rank the features computed where their position is held; they are contrasted by all alike."""
        ...

    def once(self, parameter: Tensor) -> Tensor:
        """Return a parameter that every rank uses alike, so that its gradient is counted once."""
        ...


class WholeRows:
    """Rows and images that are not shared: context parallelism is off."""

    def part(self, batch: PackedBatch) -> PackedBatch:
        """Return the micro-batch."""
        return batch

    def own(self, values_BS: Tensor) -> Tensor:
        """Return the input."""
        return values_BS

    def local(self, positions_K: Tensor) -> Tensor:
        """Return the input."""
        return positions_K

    def place(self, hidden_TH: Tensor, rows_JH: Tensor, positions_J: Tensor) -> Tensor:
        """Return ``hidden`` with ``rows`` at ``positions``."""
        return hidden_TH.index_copy(0, positions_J, rows_JH)

    def sequences(self, batch: PackedBatch) -> PackedSequences:
        """Return the documents: each attends to itself."""
        return PackedSequences.of(batch.cu_seqlens, batch.max_seqlen, row_length=batch.tokens.shape[1])

    def gather_latents(self, latents_NLH: Tensor, num_slots: int) -> Tensor:
        """Return the input."""
        return latents_NLH

    def gather_pooled(self, pooled_ND: Tensor, num_slots: int) -> Tensor:
        """Return the input."""
        return pooled_ND

    def of_holders(self, features_ND: Tensor, positions_N: Tensor) -> Tensor:
        """Return the input."""
        return features_ND

    def once(self, parameter: Tensor) -> Tensor:
        """Return the input."""
        return parameter
