"""Gathers whose sizes every rank knows beforehand, so that no size is exchanged and no device is synchronised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather_rows(local: Tensor, num_rows: Sequence[int], group: ProcessGroup | None) -> Tensor:
    """Gather each rank's rows, padded with zeros to the longest rank. Not differentiable.

    Args:
        local: (num_rows[own rank], ...) on this rank.
        num_rows: rows of every rank of the group, the same on all ranks.
        group: group to gather over; None = this process alone. One all-gather; none if no rank has rows.

    Returns:
        (ranks * max(num_rows), ...), rank after rank; rank r's rows begin at ``r * max(num_rows)``.
    """
    longest = max(num_rows)
    if group is None or longest == 0:
        return local.detach()
    padded = local.new_zeros((longest, *local.shape[1:]))
    padded[: local.shape[0]] = local.detach()
    gathered = torch.empty((longest * len(num_rows), *local.shape[1:]), dtype=local.dtype, device=local.device)
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return gathered


def pad_rows(flat: Tensor, num_rows: Sequence[int]) -> Tensor:
    """Lay out what the host knows of all ranks' rows as ``gather_rows`` lays out gathered rows.

    Args:
        flat: (sum(num_rows), ...), rank after rank without padding.
        num_rows: rows of every rank.

    Returns:
        (ranks * max(num_rows), ...), zeros (False) at the padding.
    """
    longest = max(num_rows)
    padded = flat.new_zeros((len(num_rows) * longest, *flat.shape[1:]))
    for rank, part in enumerate(flat.split(list(num_rows))):
        padded[rank * longest : rank * longest + part.shape[0]] = part
    return padded
