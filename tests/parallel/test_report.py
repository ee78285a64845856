"""Sums of a step's numbers. Oracle: the sum over the data-parallel ranks of the last stage, by hand."""

from __future__ import annotations

import pytest
import torch

from lcl_megatron.config import ParallelConfig
from lcl_megatron.parallel.groups import initialize
from lcl_megatron.parallel.report import sum_over_data_parallel
from tests.distributed import run_distributed


@pytest.mark.parametrize(("tp", "pp", "world_size"), [(1, 1, 1), (1, 1, 3), (2, 1, 4), (1, 2, 4), (2, 2, 4), (2, 2, 8)])
def test_every_rank_gets_the_sum_over_the_last_stage(tp: int, pp: int, world_size: int) -> None:
    def report(rank: int, world_size: int) -> list[float]:
        groups = initialize(
            ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp), lambda ranks: ranks[:1]
        )
        is_last = groups.pp_rank == pp - 1
        # Tensor-parallel ranks hold the same; what other stages hold must not count, nor may it be of use.
        value = 10.0**groups.dp_rank if is_last else float("nan")
        return sum_over_data_parallel(torch.tensor([value, 1.0]), groups, is_last)

    dp = world_size // (tp * pp)
    assert run_distributed(report, world_size) == [[sum(10.0**d for d in range(dp)), float(dp)]] * world_size


def test_sums_are_taken_in_double_precision() -> None:
    def report(rank: int, world_size: int) -> list[float]:
        groups = initialize(ParallelConfig(), lambda ranks: ranks[:1])
        return sum_over_data_parallel(torch.tensor([2.0**24 if rank == 0 else 1.0]), groups, True)

    assert run_distributed(report, 2) == [[2.0**24 + 1]] * 2
