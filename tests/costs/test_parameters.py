"""Parameters, buffers and optimizer state of every rank.

Oracle: the really built model, megatron-core's DDP buffers and the optimizer's tensors after a step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from lcl_megatron.config import RunConfig
from lcl_megatron.costs import buffers
from lcl_megatron.costs.memory import rank_state
from lcl_megatron.costs.traffic import StepTraffic
from lcl_megatron.parallel import engine as engines
from lcl_megatron.training.optimizer import build_optimizer
from tests.distributed import run_distributed
from tests.training.small_runs import small_config

CASES: list[tuple[str, int, dict[str, dict[str, Any]]]] = [
    ("alone, bf16", 1, {"training": {"precision": "bf16"}}),
    ("dp2, bf16", 2, {"training": {"precision": "bf16"}}),
    ("dp2, fp32", 2, {}),
    (
        "dp2, bf16, whole optimizer",
        2,
        {"training": {"precision": "bf16"}, "parallel": {"use_distributed_optimizer": False}},
    ),
    ("dp2, fp32, whole optimizer", 2, {"parallel": {"use_distributed_optimizer": False}}),
    (
        "official: no LayerScale, class token, ties or context bias",
        1,
        {
            "vision": {"layer_scale_init": None, "class_token": False},
            "language": {"tie_embeddings": False, "context_bias": False},
        },
    ),
    (
        "tp2, sequence parallel",
        2,
        {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}, "training": {"precision": "bf16"}},
    ),
    (
        "dp2 x pp2, tied matrix on both stages",
        4,
        {
            "parallel": {"pipeline_model_parallel_size": 2, "pipeline_cuts": ("language.1",)},
            "training": {"precision": "bf16"},
        },
    ),
    ("cp2, bf16", 2, {"parallel": {"context_parallel_size": 2}, "training": {"precision": "bf16"}}),
    ("pp3", 3, {"parallel": {"pipeline_model_parallel_size": 3, "pipeline_cuts": ("vision.1", "heads")}}),
]


def build(rank: int, world_size: int, config: RunConfig) -> dict[str, Any]:
    """Return what a rank really holds, and what is predicted of it."""
    groups = engines.start(config)
    engine = engines.build_engine(config, groups)
    optimizer = build_optimizer(engine)
    for parameter in engine.model.parameters():
        parameter.main_grad.fill_(1e-3)
    engine.chunks[0].finish_grad_sync()
    optimizer.step()
    tensors = {}
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                tensors[parameter.data_ptr()] = parameter
        for state in part.optimizer.state.values():
            tensors |= {value.data_ptr(): value for key, value in state.items() if key != "step"}
    model = {parameter.untyped_storage().data_ptr() for parameter in engine.model.parameters()}
    beside = [tensor for tensor in tensors.values() if tensor.untyped_storage().data_ptr() not in model]
    traffic = StepTraffic(config, world_size, groups.pp_rank)
    return {
        "parameters": [
            (
                name,
                tuple(p.shape),
                p.dtype == torch.float32,
                bool(getattr(p, "sequence_parallel", False)),
                bool(getattr(p, "shared_embedding", False)),
            )
            for name, p in engine.model.named_parameters()
        ],
        "predicted_parameters": traffic.parameters,
        "buckets": [
            [
                (bucket.grad_data.numel(), bucket.grad_data.numel() * buffer.grad_data.element_size())
                for bucket in buffer.buckets
            ]
            for buffer in engine.chunks[0].buffers
        ],
        "predicted_buckets": [[(b.numel, b.numel * 4) for b in buffer.buckets] for buffer in traffic.buffers],
        "state": (
            sum(
                p.untyped_storage().nbytes()
                for p in {p.untyped_storage().data_ptr(): p for p in engine.model.parameters()}.values()
            ),
            sum(buffer.grad_data.nbytes for buffer in engine.chunks[0].buffers),
            sum(tensor.nbytes for tensor in beside),
        ),
        "predicted_state": rank_state(traffic, groups.dp_rank * groups.cp_size + groups.cp_rank),
    }


@pytest.mark.parametrize(("name", "world_size", "changes"), CASES, ids=[case[0] for case in CASES])
def test_what_every_rank_holds(name: str, world_size: int, changes: dict[str, dict[str, Any]]) -> None:
    config = small_config(Path("none"), **{**changes, "language": {"vocab_size": 300, **changes.get("language", {})}})
    for rank, found in enumerate(run_distributed(build, world_size, config)):
        is_bf16, is_split = config.training.precision == "bf16", config.parallel.sequence_parallel
        predicted = [
            (p.name, p.shape, p.is_float32 or not is_bf16, p.sequence_parallel and is_split, p.shared_embedding)
            for p in found["predicted_parameters"]
        ]
        assert predicted == found["parameters"], f"rank {rank}"
        assert found["predicted_buckets"] == found["buckets"], f"rank {rank}"
        state = found["predicted_state"]
        assert (state.parameters, state.gradients, state.optimizer) == found["state"], f"rank {rank}"


def build_small_buckets(rank: int, world_size: int, config: RunConfig) -> tuple[int, list[list[int]], list[list[int]]]:
    """Return the real limit, and real and predicted buckets under a limit that this model reaches."""
    groups = engines.start(config)
    engine = engines.build_engine(config, groups)
    settings = dataclasses.replace(engine.chunks[0].ddp_config, bucket_size=LIMIT)
    again = type(engine.chunks[0])(
        engine.chunks[0].config, settings, engine.chunks[0].module, pg_collection=groups.collection
    )
    traffic = StepTraffic(config, world_size, 0)
    found = [[bucket.grad_data.numel() for bucket in buffer.buckets] for buffer in again.buffers]
    return (
        engine.chunks[0].bucket_size,
        found,
        [[bucket.numel for bucket in buffer.buckets] for buffer in traffic.buffers],
    )


LIMIT = 20_000


@pytest.mark.parametrize("is_sharded", [True, False])
def test_buckets_close_at_the_limit(is_sharded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(
        Path("none"), language={"vocab_size": 300}, parallel={"use_distributed_optimizer": is_sharded}
    )
    expected = max(buffers.SMALLEST_BUCKET, 2 * buffers.BUCKET_PER_RANK)
    monkeypatch.setattr(buffers, "SMALLEST_BUCKET", LIMIT)
    monkeypatch.setattr(buffers, "BUCKET_PER_RANK", 0)
    for limit, found, predicted in run_distributed(build_small_buckets, 2, config):
        assert limit == expected
        assert predicted == found
        assert len(found[0]) > 3
