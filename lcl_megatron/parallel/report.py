"""Bringing a step's numbers from the stage that has the losses to the process that writes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_megatron.parallel.groups import ProcessGroups


def sum_over_data_parallel(values: Tensor, groups: ProcessGroups, is_last_stage: bool) -> list[float]:
    """Return values summed over the data-parallel ranks of the last stage, on every rank.

    Args:
        values: (k,) float32; read on the last stage only, where tensor- and context-parallel ranks hold the same.
        groups: process groups.
        is_last_stage: whether this rank is on the last stage.

    Parallel: one all-reduce over all ranks, on the host.
    """
    counts = is_last_stage and groups.tp_rank == 0 and groups.cp_rank == 0
    values = values.detach().cpu().double() if counts else torch.zeros(values.shape, dtype=torch.float64)
    dist.all_reduce(values, group=groups.host)
    return values.tolist()


def gather_over_ranks(values: Sequence[float], groups: ProcessGroups) -> list[list[float]]:
    """Return every rank's values, in the order of ranks, on every rank.

    Args:
        values: as many on every rank.
        groups: process groups.

    Parallel: one all-gather over all ranks, on the host.
    """
    own = torch.tensor(values, dtype=torch.float64)
    gathered = torch.empty(groups.world_size * len(values), dtype=torch.float64)
    dist.all_gather_into_tensor(gathered, own, group=groups.host)
    return gathered.view(groups.world_size, len(values)).tolist()


def sum_over_context_parallel(share: Tensor, groups: ProcessGroups) -> Tensor:
    """Return a tensor summed over the context-parallel ranks, on each of them; not differentiable.

    Parallel: one all-reduce over cp, on the device; none without context parallelism.
    """
    total = share.detach()
    if groups.cp_size > 1:
        total = total.clone()
        dist.all_reduce(total, group=groups.cp)
    return total
