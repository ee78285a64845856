"""Context parallelism: the positions of every row, and the images of every micro-batch, shared by the ranks of cp.

All ranks of a cp group read the same micro-batches. Positions are divided by ``zigzag``; images in contiguous parts.

| what | who computes it | what travels | gradient |
|---|---|---|---|
| encoder and pool of an image | one rank | its latents, its global latent, to all | see below |
| layers and next-token loss of a position | its holder | keys and values, to all | summed back to the holder |
| context feature of an image | the holder of its ``<BoI>`` | the feature, to all | kept by the holder |
| contrastive loss, from features of all images | every rank alike | nothing | whole on every rank |

Gradients of parameters are summed over dp x cp, so each rank must keep its *share* of each. Latents are read by
whoever holds their positions: shares, which are summed on the way back. Features are contrasted by all ranks alike:
each has the whole gradient, of which it keeps what it computed. ``logit_scale`` is used by all alike: one keeps it.

Shape letters: B rows, S positions, T positions on this rank, E keys that its queries attend to, A heads, D head or
feature width, N images, L latents per image, H language width, K or J some flat positions.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.model.attention import PackedSequences
from lcl_megatron.model.parts import present
from lcl_megatron.parallel.groups import ProcessGroups
from lcl_megatron.parallel.zigzag import ZigZag, encoded_slots, images_of


class ContextParallelRows:
    """``RowEdge`` over the context-parallel group.

    Args:
        groups: process groups.
        row_length: positions S of a row.
    """

    def __init__(self, groups: ProcessGroups, row_length: int) -> None:
        self._group = groups.cp
        self._rank, self._size = groups.cp_rank, groups.cp_size
        self._zigzag = ZigZag(self._size, row_length)

    def part(self, batch: PackedBatch) -> PackedBatch:
        """Return the micro-batch with this rank's targets, images and attention; on the host, nothing is sent."""
        slots = encoded_slots(batch.num_image_slots, self._rank, self._size)
        encoded = slice(slots.start, slots.stop)
        is_own = self._zigzag.owner(batch.label_positions) == self._rank
        return dataclasses.replace(
            batch,
            label_positions=batch.label_positions[is_own],
            image_keys=batch.image_keys[encoded],
            images=None if batch.images is None else batch.images[encoded],
            runs=self._zigzag.runs(batch.cu_seqlens, self._rank),
        )

    def own(self, values_BS: Tensor) -> Tensor:
        """Return this rank's entries, (B, S / cp)."""
        return self._zigzag.take(values_BS, self._rank)

    def local(self, positions_K: Tensor) -> Tensor:
        """Return this rank's flat positions (K,); of another rank's position, where that rank holds it."""
        return self._zigzag.local(positions_K)

    def place(self, hidden_TH: Tensor, rows_JH: Tensor, positions_J: Tensor) -> Tensor:
        """Return this rank's ``hidden`` with those of ``rows`` whose position is here.

        The others go to one row behind the end, which is cut off: shapes, and the work, do not depend on the data.
        """
        num_here = hidden_TH.shape[0]
        local_J = torch.where(self._is_here(positions_J), self.local(positions_J), num_here)
        return F.pad(hidden_TH, (0, 0, 0, 1)).index_copy(0, local_J, rows_JH)[:num_here]

    def sequences(self, batch: PackedBatch) -> PackedSequences:
        """Return this rank's runs of queries; each layer then fetches the keys of the whole rows.

        Parallel: in each layer an all-gather of keys and values over cp, and a reduce-scatter of their gradients.
        """
        runs = present(batch.runs)

        def exchange(key_TAD: Tensor, value_TAD: Tensor) -> tuple[Tensor, Tensor]:
            both = torch.stack([key_TAD, value_TAD], dim=1)
            keys, values = gather_from_sequence_parallel_region(both, group=self._group).unbind(1)
            return keys.index_select(0, runs.key_rows), values.index_select(0, runs.key_rows)

        return PackedSequences.of_runs(runs, self._zigzag.local_length, exchange)

    def gather_latents(self, latents_NLH: Tensor, num_slots: int) -> Tensor:
        """Return all images' latents (N, L, H) of those that this rank encoded.

        Parallel: an all-gather over cp. Backward: each rank's gradient is that of the positions it holds, so they are
        summed; a rank keeps that of its images.
        """
        return self._gather(latents_NLH, num_slots, sum_gradients=True)

    def gather_pooled(self, pooled_ND: Tensor, num_slots: int) -> Tensor:
        """Return all images' global latents (N, D) of those that this rank encoded.

        Parallel: an all-gather over cp. Backward: every rank has the whole gradient and keeps that of its images;
        nothing is sent.
        """
        return self._gather(pooled_ND, num_slots, sum_gradients=False)

    def of_holders(self, features_ND: Tensor, positions_N: Tensor) -> Tensor:
        """Return on every rank the features (N, D) that the holders of the positions computed.

        Parallel: an all-reduce over cp, to which a rank adds zeros for what it does not hold. Backward: every rank has
        the whole gradient and keeps that of its positions; nothing is sent.
        """
        is_here_N1 = self._is_here(positions_N)[:, None]
        own_ND = features_ND.masked_fill(~is_here_N1, 0.0)
        return reduce_from_tensor_model_parallel_region(own_ND, group=self._group)

    def once(self, parameter: Tensor) -> Tensor:
        """Return the parameter; its gradient, whole on every rank, reaches the first rank and is zero on the others."""
        return parameter if self._rank == 0 else parameter.detach() + 0.0 * parameter

    def _is_here(self, positions_K: Tensor) -> Tensor:
        return self._zigzag.owner(positions_K) == self._rank

    def _gather(self, encoded: Tensor, num_slots: int, sum_gradients: bool) -> Tensor:
        """Gather ragged parts whose sizes every rank knows, as parts of equal size."""
        counts = [len(images_of(num_slots, rank, self._size)) for rank in range(self._size)]
        # What was encoded instead of nothing is left out here.
        own = encoded[: counts[self._rank]]
        padding = own.new_zeros((max(counts) - own.shape[0], *own.shape[1:]))
        gathered = gather_from_sequence_parallel_region(
            torch.cat([own, padding]), tensor_parallel_output_grad=sum_gradients, group=self._group
        )
        parts = gathered.chunk(self._size)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
