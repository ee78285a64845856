"""Which positions of a row each of R ranks holds, so that causal attention costs all of them the same.

A row of S positions is cut into 2 R chunks. Rank r holds chunks r and 2 R - 1 - r, in this order:

    R = 2:   | 0 | 1 | 1 | 0 |

The work of causal attention grows along a document, so a rank with an early chunk gets a late one too. Documents may
begin and end anywhere. On a rank, positions lie row after row; among all ranks, rank after rank.

Pure arithmetic, the same on every rank: nothing is communicated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.data.batch import AttentionRuns


@dataclass(frozen=True)
class ZigZag:
    """The division of rows of equal length over ranks.

    Shape letters: B rows, S positions of a row, K flat positions of the whole rows.
    """

    size: int
    """Number of ranks R."""
    row_length: int
    """S, a multiple of 2 R."""

    def __post_init__(self) -> None:
        if self.row_length % (2 * self.size):
            raise ValueError(
                f"rows of {self.row_length} positions cannot be cut into {2 * self.size} equal chunks, two for each "
                f"of {self.size} ranks; choose a multiple of {2 * self.size}"
            )

    @property
    def chunk_length(self) -> int:
        """Positions of a chunk."""
        return self.row_length // (2 * self.size)

    @property
    def local_length(self) -> int:
        """Positions of a row on one rank."""
        return self.row_length // self.size

    def owner(self, positions_K: Tensor) -> Tensor:
        """Return the rank (K,) that holds each position."""
        chunk_K = positions_K % self.row_length // self.chunk_length
        return torch.minimum(chunk_K, 2 * self.size - 1 - chunk_K)

    def local(self, positions_K: Tensor) -> Tensor:
        """Return where its holder has each position: flat positions (K,) of its rows of ``local_length``."""
        within_K = positions_K % self.row_length
        is_late_K = within_K >= self.row_length // 2
        row_K = positions_K // self.row_length
        return row_K * self.local_length + is_late_K * self.chunk_length + within_K % self.chunk_length

    def take(self, values_BS: Tensor, rank: int) -> Tensor:
        """Return a rank's entries (B, S / R) of values (B, S)."""
        chunks = values_BS.unflatten(1, (2 * self.size, self.chunk_length))
        return torch.cat([chunks[:, rank], chunks[:, 2 * self.size - 1 - rank]], dim=1)

    def runs(self, cu_seqlens: Tensor, rank: int) -> AttentionRuns:
        """Return what a rank's positions attend to.

        Args:
            cu_seqlens: (documents + 1,) int32 on the host, borders of the documents; none crosses the end of a row.
            rank: the rank.
        """
        documents = cu_seqlens.numpy().astype(np.int64)
        end = int(documents[-1])
        borders = np.unique(np.concatenate([documents, np.arange(0, end, self.chunk_length)]))
        owned = self.owner(torch.from_numpy(borders[:-1])).numpy() == rank
        begins, ends = borders[:-1][owned], borders[1:][owned]
        key_begins = documents[np.searchsorted(documents, begins, side="right") - 1]
        queries, keys = ends - begins, ends - key_begins
        key_borders = np.append(0, keys.cumsum())
        key_positions = np.arange(key_borders[-1]) + np.repeat(key_begins - key_borders[:-1], keys)
        positions = torch.from_numpy(key_positions)
        return AttentionRuns(
            query_borders=torch.from_numpy(np.append(0, queries.cumsum()).astype(np.int32)),
            key_borders=torch.from_numpy(key_borders.astype(np.int32)),
            key_rows=self.owner(positions) * (end // self.size) + self.local(positions),
            lengths=tuple(zip(queries.tolist(), keys.tolist(), strict=True)),
        )


def images_of(num_slots: int, rank: int, size: int) -> range:
    """Return which image slots of a micro-batch a rank encodes: a contiguous part, even to one image; may be empty."""
    return range(num_slots * rank // size, num_slots * (rank + 1) // size)


def encoded_slots(num_slots: int, rank: int, size: int) -> range:
    """Return what a rank encodes: ``images_of``, or one slot of another rank's instead of none, to be left out again.

    Every rank runs the encoder, so that its parameters have gradients (zero, then) and no rank waits for them.
    """
    own = images_of(num_slots, rank, size)
    return own if own else range(num_slots - 1, num_slots)
