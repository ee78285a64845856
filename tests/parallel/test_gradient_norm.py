"""The gradient norm and the update.

Oracle: megatron-core's own ``step`` on the same gradients, bit by bit; and the promise that every rank sees one norm,
with one all-reduce, whichever rank's gradient is not finite.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lcl_megatron.config import OptimizerConfig, ParallelConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel import engine as engines
from lcl_megatron.parallel.agreement import agree
from lcl_megatron.parallel.gradient_norm import clip_and_update, gradient_norm
from lcl_megatron.training.objective import losses_and_gradients
from lcl_megatron.training.optimizer import build_optimizer
from tests.batches import layout_of, make_rows
from tests.costs.recorder import TrafficRecorder
from tests.distributed import run_distributed
from tests.parallel.test_layouts import CONFIG, ROWS

LAYOUTS = [
    (1, ParallelConfig()),
    (2, ParallelConfig()),
    (2, ParallelConfig(use_distributed_optimizer=False)),
    (4, ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
    (4, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=False)),
    (2, ParallelConfig(context_parallel_size=2)),
]


def _prepare(parallel: ParallelConfig, precision: Any, clip_grad: float) -> tuple[Any, Any]:
    """Return engine and optimizer behind the backward pass of one step."""
    config = dataclasses.replace(
        CONFIG,
        parallel=parallel,
        optimizer=OptimizerConfig(lr=0.1, lr_warmup_iters=1, clip_grad=clip_grad),
        training=dataclasses.replace(CONFIG.training, micro_batch_size=1, precision=precision),
    )
    groups = engines.start(config)
    engine = engines.build_engine(config, groups)
    optimizer = build_optimizer(engine)
    rows = make_rows(config, ROWS)
    grid = [rows[i : i + groups.dp_size] for i in range(0, len(rows), groups.dp_size)]
    batch = StepBatch(0, layout_of(grid), tuple(ranks[groups.dp_rank] for ranks in grid))
    engine.zero_gradients()
    optimizer.zero_grad()
    losses_and_gradients(engine, agree(batch, groups))
    return engine, optimizer


def _weights(engine: Any) -> list[np.ndarray]:
    with engine.whole_parameters():
        return [p.detach().view(torch.uint8).numpy().copy() for model in engine.models for p in model.parameters()]


def _step_both_ways(rank: int, world_size: int, parallel: ParallelConfig, precision: str, clip_grad: float) -> float:
    engine, optimizer = _prepare(parallel, precision, clip_grad)
    _, expected, _ = optimizer.step()
    weights = _weights(engine)
    engine.groups.destroy()
    engine, optimizer = _prepare(parallel, precision, clip_grad)
    optimizer.prepare_grads()
    norm = gradient_norm(optimizer, engine.device)
    clip_and_update(optimizer, norm, clip_grad)
    assert norm == expected
    for ours, theirs in zip(_weights(engine), weights, strict=True):
        assert np.array_equal(ours, theirs)
    return norm


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
@pytest.mark.parametrize(("precision", "clip_grad"), [("fp32", 0.1), ("bf16", 0.0)])
def test_norm_and_update_are_those_of_megatron_core(
    world_size: int, parallel: ParallelConfig, precision: str, clip_grad: float
) -> None:
    norms = run_distributed(_step_both_ways, world_size, parallel, precision, clip_grad)
    assert len(set(norms)) == 1
    assert norms[0] > 0.1


def _spoil(rank: int, world_size: int, parallel: ParallelConfig) -> list[float]:
    """Return the norms with every rank's gradients spoilt in turn: the last parameter it updates, then the first."""
    engine, optimizer = _prepare(parallel, "fp32", 1.0)
    optimizer.prepare_grads()
    (part,) = optimizer.chained_optimizers
    group = part.get_grad_stats_parallel_group()
    # Behind the reduction only the ranks of the group can see it: without the distributed optimizer the replicas of
    # such a rank hold the same gradient, so it is spoilt on all of them.
    mine = rank if parallel.use_distributed_optimizer else dist.get_process_group_ranks(group).index(rank)
    norms = []
    for bad in range(dist.get_world_size(group)):
        for value in (math.nan, math.inf):
            for parameter in (part.get_parameters()[-1], part.get_parameters()[0]):
                kept = parameter.grad.view(-1)[0].clone()
                if mine == bad:
                    parameter.grad.view(-1)[0] = value
                norms.append(gradient_norm(optimizer, engine.device))
                parameter.grad.view(-1)[0] = kept
    with TrafficRecorder(engine.groups) as traffic:
        norms.append(gradient_norm(optimizer, engine.device))
    assert sum(traffic.counts.values()) == (dist.get_world_size(group) > 1)
    assert sum(traffic.bytes.values()) == 4 * (dist.get_world_size(group) > 1)
    assert dist.get_world_size(group) == (
        world_size if parallel.use_distributed_optimizer else engine.groups.tp_size * engine.groups.pp_size
    )
    return norms


@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS)
def test_whatever_is_not_finite_shows_on_all_ranks(world_size: int, parallel: ParallelConfig) -> None:
    for norms in run_distributed(_spoil, world_size, parallel):
        assert not any(map(math.isfinite, norms[:-1]))
        assert math.isfinite(norms[-1])
