"""Sums of a step's numbers. Oracle: the sum over the data-parallel ranks of the last stage, by hand."""

from __future__ import annotations

import pytest
import torch

from lcl_megatron.config import ParallelConfig
from lcl_megatron.parallel.groups import initialize
from lcl_megatron.parallel.report import gather_over_ranks, sum_over_context_parallel, sum_over_data_parallel
from tests.distributed import run_distributed


@pytest.mark.parametrize(
    ("tp", "pp", "cp", "world_size"),
    [(1, 1, 1, 1), (1, 1, 1, 3), (2, 1, 1, 4), (1, 2, 1, 4), (2, 2, 1, 4), (2, 2, 1, 8), (1, 1, 2, 4), (1, 2, 2, 8)],
)
def test_every_rank_gets_the_sum_over_the_last_stage(tp: int, pp: int, cp: int, world_size: int) -> None:
    def report(rank: int, world_size: int) -> list[float]:
        parallel = ParallelConfig(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp
        )
        groups = initialize(parallel, lambda ranks: ranks[:1])
        is_last = groups.pp_rank == pp - 1
        # Tensor- and context-parallel ranks hold the same; what other stages hold must not count, nor may it be of use.
        value = 10.0**groups.dp_rank if is_last else float("nan")
        return sum_over_data_parallel(torch.tensor([value, 1.0]), groups, is_last)

    dp = world_size // (tp * pp * cp)
    assert run_distributed(report, world_size) == [[sum(10.0**d for d in range(dp)), float(dp)]] * world_size


def test_sums_are_taken_in_double_precision() -> None:
    def report(rank: int, world_size: int) -> list[float]:
        groups = initialize(ParallelConfig(), lambda ranks: ranks[:1])
        return sum_over_data_parallel(torch.tensor([2.0**24 if rank == 0 else 1.0]), groups, True)

    assert run_distributed(report, 2) == [[2.0**24 + 1]] * 2


def test_every_rank_gets_the_values_of_all_in_the_order_of_ranks() -> None:
    def gather(rank: int, world_size: int) -> list[list[float]]:
        return gather_over_ranks([rank + 0.1, 2.0**53 - rank], initialize(ParallelConfig(), lambda ranks: ranks[:1]))

    assert run_distributed(gather, 3) == [[[rank + 0.1, 2.0**53 - rank] for rank in range(3)]] * 3


def test_shares_of_context_parallel_ranks_are_added_and_the_share_stays() -> None:
    def add(rank: int, world_size: int) -> tuple[float, float, bool]:
        groups = initialize(ParallelConfig(context_parallel_size=2), lambda ranks: ranks[:1])
        share = torch.tensor(10.0**rank, requires_grad=True)
        total = sum_over_context_parallel(share, groups)
        return float(share.detach()), float(total), total.requires_grad

    sums = [11.0, 11.0, 1100.0, 1100.0]
    assert run_distributed(add, 4) == [(10.0**rank, total, False) for rank, total in enumerate(sums)]
