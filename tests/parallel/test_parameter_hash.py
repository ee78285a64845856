"""Hashes of weights.

Oracle: the same sum in Python's integers of unlimited size; every single bit of a tensor flipped; ranks on one of which
a bit is flipped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.config import ParallelConfig
from lcl_megatron.parallel import engine as engines
from lcl_megatron.parallel import parameter_hash
from lcl_megatron.parallel.parameter_hash import (
    ReplicaMismatchError,
    compare_replicas,
    hash_parameters,
    hash_tensors,
    ranks_of_lost_weights,
)
from tests.distributed import run_distributed
from tests.parallel.test_layouts import CONFIG

MASK = (1 << 64) - 1


def hash_by_hand(*tensors: torch.Tensor) -> int:
    """The sum of bits times odd weights, splitmix64's two multiplications, in Python's integers."""
    total, place = 0, 0
    for tensor in tensors:
        size = tensor.element_size()
        for value in tensor.detach().flatten().view(torch.uint8).numpy().view(f"<i{size}").tolist():
            place += 1
            mixed = signed(place * 0x9E3779B97F4A7C15)
            mixed = signed((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9)
            total += value * ((mixed ^ (mixed >> 32)) | 1)
    return signed(total)


def signed(value: int) -> int:
    value &= MASK
    return value - (1 << 64) if value >> 63 else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_a_hash_is_a_sum_of_weighted_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = [(torch.randn(shape, generator=generator) * 100).to(dtype) for shape in ((5, 7), (1,), (64,), ())]
    assert hash_tensors(tensors) == hash_by_hand(*tensors)
    monkeypatch.setattr(parameter_hash, "_CHUNK", 9)
    assert hash_tensors(tensors) == hash_by_hand(*tensors)
    assert hash_tensors([tensors[0].T.contiguous().T, *tensors[1:]]) == hash_by_hand(*tensors)
    assert hash_tensors([]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_counts(dtype: torch.dtype) -> None:
    tensor = torch.randn(24, generator=torch.Generator().manual_seed(4)).to(dtype)
    raw = tensor.view(torch.uint8)
    hashes = {hash_tensors([tensor])}
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        hashes.add(hash_tensors([tensor]))
        raw[bit // 8] ^= 1 << bit % 8
    assert len(hashes) == 1 + 8 * len(raw)


def test_order_zeros_and_nan_count() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    assert hash_tensors([one]) != hash_tensors([two])
    assert hash_tensors([torch.tensor([0.0])]) != hash_tensors([torch.tensor([-0.0])])
    assert hash_tensors([torch.tensor([float("nan")])]) == hash_tensors([torch.tensor([float("nan")])])


def _compare(
    rank: int, world_size: int, parallel: ParallelConfig, flipped: tuple[int, ...], agreed: int = 0
) -> tuple[int, str]:
    """Flip one bit of a weight on some ranks; return the hash before, and what the comparison says."""
    config = dataclasses.replace(
        CONFIG, parallel=parallel, training=dataclasses.replace(CONFIG.training, micro_batch_size=1)
    )
    engine = engines.build_engine(config, engines.start(config))
    compare_replicas(engine, 1, 0)
    before = hash_parameters(engine)
    if rank in flipped:
        parameter = list(engine.models[-1].parameters())[3]
        raw: Any = parameter.detach().view(-1).view(torch.uint8).numpy()
        raw[5] ^= np.uint8(1 << rank)
    try:
        compare_replicas(engine, 8, agreed)
    except ReplicaMismatchError as error:
        return before, str(error)
    return before, ""


def test_equal_replicas_have_equal_hashes() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, overlap_param_gather=True)
    found = run_distributed(_compare, 4, parallel, ())
    assert [said for _, said in found] == [""] * 4
    hashes = [value for value, _ in found]
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]


@pytest.mark.parametrize("use_distributed_optimizer", [True, False])
def test_one_flipped_bit_on_one_of_three_is_named(use_distributed_optimizer: bool) -> None:
    parallel = ParallelConfig(use_distributed_optimizer=use_distributed_optimizer)
    for _, said in run_distributed(_compare, 3, parallel, (1,), 6):
        assert said == (
            "step 8: replicas of the same weights differ (equal after step 6): rank 1 (dp1 pp0 tp0) differs from the 2 "
            "other replicas. Memory, arithmetic or a network card corrupts data silently: drain that node, and go on "
            "from the newest checkpoint up to step 6"
        )


def test_of_two_replicas_both_are_named() -> None:
    parallel = ParallelConfig(pipeline_model_parallel_size=2)
    for _, said in run_distributed(_compare, 4, parallel, (3,)):
        assert "(they have not been compared before)" in said
        assert "no majority says which is right among rank 2 (dp0 pp1 tp0), rank 3 (dp1 pp1 tp0). " in said
        assert said.endswith("drain that node, and go on from the last checkpoint")


def test_context_parallel_ranks_are_replicas_too() -> None:
    parallel = ParallelConfig(context_parallel_size=2)
    for _, said in run_distributed(_compare, 4, parallel, (1,)):
        assert "rank 1 (dp0 pp0 cp1 tp0) differs from the 3 other replicas" in said


def test_every_part_that_differs_is_named() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    for _, said in run_distributed(_compare, 6, parallel, (2, 5)):
        assert "rank 2 (dp1 pp0 tp0) differs from the 2 other replicas; rank 5 (dp2 pp0 tp1) differs from" in said


def _lose(rank: int, world_size: int) -> tuple[list[str], list[str]]:
    config = dataclasses.replace(
        CONFIG,
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        training=dataclasses.replace(CONFIG.training, micro_batch_size=1, precision="bf16"),
    )
    engine = engines.build_engine(config, engines.start(config))
    before = ranks_of_lost_weights(engine)
    if rank in (1, 2):
        list(engine.models[0].parameters())[-1].detach().view(-1)[0] = (torch.inf, torch.nan)[rank - 1]
    return before, ranks_of_lost_weights(engine)


def test_ranks_whose_weights_are_not_finite_are_named() -> None:
    assert run_distributed(_lose, 4) == [([], ["rank 1 (dp0 pp0 tp1)", "rank 2 (dp1 pp0 tp0)"])] * 4
