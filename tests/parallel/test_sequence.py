"""Sequence parallelism. Oracle: the same operations on the whole sequence in one process, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lcl_megatron.config import ParallelConfig
from lcl_megatron.model.sequence_edge import WholeSequence
from lcl_megatron.parallel.groups import initialize
from lcl_megatron.parallel.sequence import TensorParallelSequence
from tests.distributed import run_distributed

TOKENS, WIDTH = 12, 3
POSITIONS = {
    "on all ranks": [0, 11, 5, 6],
    "one rank only": [3, 4],
    "repeated": [7, 7, 1, 7],
    "none": [],
}


def _whole(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _edge(world_size: int) -> tuple[TensorParallelSequence, int]:
    groups = initialize(
        ParallelConfig(tensor_model_parallel_size=world_size, sequence_parallel=True), lambda pipeline: pipeline[:1]
    )
    return TensorParallelSequence(groups), groups.tp_rank


def _with_gradient(output: Tensor, x: Tensor, direction: Tensor) -> tuple[Any, Any]:
    (gradient,) = torch.autograd.grad(output, x, direction)
    return output.detach().numpy(), gradient.numpy()


@pytest.mark.parametrize("world_size", [2, 4])
def test_scatter_gives_each_rank_its_rows_and_every_rank_the_whole_gradient(world_size: int) -> None:
    def scatter(rank: int, world_size: int) -> tuple[Any, Any]:
        edge, tp_rank = _edge(world_size)
        x = _whole(0, TOKENS, 1, WIDTH).requires_grad_()
        return _with_gradient(edge.scatter(x), x, _whole(1, TOKENS, 1, WIDTH).chunk(world_size)[tp_rank])

    results = run_distributed(scatter, world_size)
    for (rows, gradient), expected in zip(results, _whole(0, TOKENS, 1, WIDTH).chunk(world_size), strict=True):
        assert (rows == expected.numpy()).all()
        assert (gradient == _whole(1, TOKENS, 1, WIDTH).numpy()).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_gather_gives_every_rank_the_whole_and_its_rows_of_the_gradient(world_size: int) -> None:
    """What follows is computed alike on every rank: its gradient must not be counted once for each."""

    def gather(rank: int, world_size: int) -> tuple[Any, Any]:
        edge, tp_rank = _edge(world_size)
        x = _whole(0, TOKENS, 1, WIDTH).chunk(world_size)[tp_rank].clone().requires_grad_()
        return _with_gradient(edge.gather(x), x, _whole(1, TOKENS, 1, WIDTH))

    results = run_distributed(gather, world_size)
    for (whole, gradient), expected in zip(results, _whole(1, TOKENS, 1, WIDTH).chunk(world_size), strict=True):
        assert (whole == _whole(0, TOKENS, 1, WIDTH).numpy()).all()
        assert (gradient == expected.numpy()).all()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_picked_rows_and_their_gradient_equal_those_of_the_whole_sequence(
    positions: list[int], world_size: int
) -> None:
    index = torch.tensor(positions, dtype=torch.int64)
    direction = _whole(1, len(positions), WIDTH)

    def pick(rank: int, world_size: int) -> tuple[Any, Any]:
        edge, tp_rank = _edge(world_size)
        x = _whole(0, TOKENS, 1, WIDTH).chunk(world_size)[tp_rank].clone().requires_grad_()
        return _with_gradient(edge.pick_rows(x, index), x, direction)

    x = _whole(0, TOKENS, 1, WIDTH).requires_grad_()
    expected, gradient = _with_gradient(WholeSequence().pick_rows(x, index), x, direction)
    by_hand = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    for row, position in zip(direction, positions, strict=True):
        by_hand[position] += row
    assert (gradient[:, 0] == by_hand.numpy()).all()
    size = TOKENS // world_size
    for rank, (rows, own) in enumerate(run_distributed(pick, world_size)):
        assert (rows == expected).all()
        assert (own == gradient[rank * size : (rank + 1) * size]).all()


def test_shards_of_a_constant_and_the_multiple() -> None:
    def shard(rank: int, world_size: int) -> tuple[list[int], int]:
        edge, _ = _edge(world_size)
        return edge.shard(torch.arange(8)).tolist(), edge.multiple

    assert run_distributed(shard, 4) == [([0, 1], 4), ([2, 3], 4), ([4, 5], 4), ([6, 7], 4)]


def test_whole_sequence_passes_everything_through() -> None:
    edge, x = WholeSequence(), _whole(0, TOKENS, 1, WIDTH)
    assert edge.multiple == 1
    assert edge.scatter(x) is x
    assert edge.gather(x) is x
    assert edge.shard(x) is x
