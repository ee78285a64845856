"""Overlapping gradient reduction and parameter gathering must not change what is trained.

Oracle: the same steps without overlap and without the distributed optimizer, on the same ranks; for interleaved stages
also one stage per rank.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lcl_megatron.config import LossConfig, OptimizerConfig, ParallelConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel import engine as engines
from lcl_megatron.parallel.agreement import agree
from lcl_megatron.training.objective import losses_and_gradients
from lcl_megatron.training.optimizer import build_optimizer, build_scheduler
from tests.batches import layout_of, make_rows
from tests.distributed import run_distributed
from tests.parallel.test_layouts import CONFIG, ROWS

INTERLEAVED = ParallelConfig(
    pipeline_model_parallel_size=2,
    virtual_pipeline_model_parallel_size=2,
    pipeline_cuts=("vision.1", "language.embed", "language.1"),
)
# Token embedding and heads are both on the last rank.
INTERLEAVED_TIED = dataclasses.replace(INTERLEAVED, pipeline_cuts=("pool", "language.embed", "heads"))
SWITCHED_OFF = {"use_distributed_optimizer": False, "overlap_grad_reduce": False, "overlap_param_gather": False}


def _train(
    rank: int, world_size: int, parallel: ParallelConfig, tied: bool, loss: LossConfig = CONFIG.loss
) -> dict[str, np.ndarray]:
    """Return the parameters of this rank after three steps."""
    config = dataclasses.replace(
        CONFIG,
        loss=loss,
        parallel=parallel,
        language=dataclasses.replace(CONFIG.language, tie_embeddings=tied),
        # Usual Adam makes a step of full length out of the rounding noise of a zero gradient (a key bias has none);
        # with so large an epsilon, steps are proportional to gradients.
        optimizer=OptimizerConfig(lr=0.1, adam_eps=1.0, lr_warmup_iters=1),
        training=dataclasses.replace(CONFIG.training, micro_batch_size=1, train_iters=10),
    )
    groups = engines.start(config)
    engine = engines.build_engine(config, groups)
    optimizer = build_optimizer(engine)
    scheduler = build_scheduler(config, optimizer)
    rows = make_rows(config, ROWS)
    grid = [rows[i : i + groups.dp_size] for i in range(0, len(rows), groups.dp_size)]
    for step in range(3):
        batch = StepBatch(step, layout_of(grid), tuple(ranks[groups.dp_rank] for ranks in grid))
        agreed = agree(batch, groups)
        engine.zero_gradients()
        optimizer.zero_grad()
        losses_and_gradients(engine, agreed)
        scheduler.step(1)
        optimizer.step()
        engine.clamp_logit_scale()
    with engine.whole_parameters():
        return {name: p.detach().numpy().copy() for model in engine.models for name, p in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(overlap_param_gather=True),
        ParallelConfig(use_distributed_optimizer=False, overlap_grad_reduce=True),
        ParallelConfig(overlap_param_gather=True, pipeline_model_parallel_size=2, pipeline_cuts=("language.1",)),
        ParallelConfig(overlap_param_gather=True, context_parallel_size=2),
        INTERLEAVED,
        dataclasses.replace(INTERLEAVED, overlap_param_gather=True),
        dataclasses.replace(INTERLEAVED_TIED, overlap_param_gather=True),
        dataclasses.replace(INTERLEAVED_TIED, overlap_grad_reduce=False),
    ],
    ids=[
        "distributed optimizer",
        "overlapped gather",
        "overlapped reduction",
        "overlapped gather, pp2",
        "overlapped gather, cp2",
        "pp2 x 2 stages",
        "overlapped gather, pp2 x 2 stages",
        "overlapped gather, pp2 x 2 stages, tied on a rank",
        "nothing overlapped, pp2 x 2 stages, tied on a rank",
    ],
)
def test_overlap_trains_the_same_weights(parallel: ParallelConfig, tied: bool) -> None:
    plain = dataclasses.replace(parallel, **SWITCHED_OFF)
    world_size = 2 * parallel.pipeline_model_parallel_size
    expected: list[Any] = run_distributed(_train, world_size, plain, tied)
    found: list[Any] = run_distributed(_train, world_size, parallel, tied)
    _compare(found, expected)


@pytest.mark.parametrize("keep_graphs", [False, True], ids=["two passes", "graphs kept"])
def test_overlap_with_global_scope(keep_graphs: bool) -> None:
    """The first of the two passes finds parameters still on their way; the last gradient starts the reduction."""
    loss = dataclasses.replace(CONFIG.loss, contrastive_scope="global", contrastive_keep_graphs=keep_graphs)
    expected: list[Any] = run_distributed(
        _train, 2, ParallelConfig(**SWITCHED_OFF), True, dataclasses.replace(loss, contrastive_keep_graphs=False)
    )
    _compare(run_distributed(_train, 2, ParallelConfig(overlap_param_gather=True), True, loss), expected)


def _compare(found: list[Any], expected: list[Any]) -> None:
    for rank, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-6, err_msg=f"rank {rank} {name}")


@pytest.mark.parametrize("parallel", [INTERLEAVED, INTERLEAVED_TIED], ids=["tied over ranks", "tied on a rank"])
def test_interleaved_stages_train_the_weights_of_one_stage_per_rank(parallel: ParallelConfig) -> None:
    """All of them, with gradients clipped by their common norm."""
    single = ParallelConfig(pipeline_model_parallel_size=2, pipeline_cuts=("language.1",), **SWITCHED_OFF)
    expected: dict[str, np.ndarray] = {}
    for weights in run_distributed(_train, 4, single, True):
        expected |= weights
    for weights in run_distributed(_train, 4, parallel, True):
        for name, value in weights.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
