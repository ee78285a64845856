"""What a training step moves.

Oracle: real training steps on 1, 2 and 4 gloo ranks, of which torch's dispatcher reports every call (``recorder.py``).
Calls and bytes must be equal, by group and kind, on every rank, for uneven image counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.config import RunConfig
from lcl_megatron.costs.counts import StepCounts
from lcl_megatron.costs.traffic import StepTraffic, totals
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step
from tests.costs.recorder import TrafficRecorder
from tests.distributed import run_distributed
from tests.training.small_runs import DataFolder, plain_document, small_config

Totals = dict[tuple[str, str], tuple[int, int]]
STEPS = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("traffic") / "data")
    data.write([plain_document(number) for number in range(24)])
    data.preprocess()
    return data.corpus


def count_and_predict(rank: int, world_size: int, config: RunConfig) -> list[tuple[Totals, Totals]]:
    """Return (counted, predicted) of the first steps on this rank."""
    found = []
    with run_from(config) as run:
        batches = iter(run.loader)
        for _ in range(STEPS):
            batch = next(batches)
            with TrafficRecorder(run.engine.groups) as recorder:
                train_step(run, batch)
            parts = tuple(run.engine.rows.part(micro_batch) for micro_batch in batch.micro_batches)
            counts = StepCounts.of_batch(parts, batch.layout)
            groups = run.engine.groups
            traffic = StepTraffic(run.config, world_size, groups.pp_rank, groups.cp_rank)
            found.append((recorder.totals(), dict(totals(traffic.step(counts)))))
    return found


Case = tuple[str, int, dict[str, dict[str, Any]]]

LAYOUT_CASES: list[Case] = [
    ("alone", 1, {}),
    ("dp2", 2, {}),
    ("dp2, bf16", 2, {"training": {"precision": "bf16"}}),
    ("dp2, overlapped gather", 2, {"parallel": {"overlap_param_gather": True}}),
    ("dp2, no overlap", 2, {"parallel": {"overlap_grad_reduce": False}}),
    ("dp2, whole optimizer", 2, {"parallel": {"use_distributed_optimizer": False}}),
    ("dp2, no clipping", 2, {"optimizer": {"clip_grad": 0.0}}),
    ("dp4", 4, {"training": {"micro_batch_size": 1}}),
    ("tp2", 2, {"parallel": {"tensor_model_parallel_size": 2}}),
    ("tp2, chunks", 2, {"parallel": {"tensor_model_parallel_size": 2}, "loss": {"cross_entropy_chunk_size": 7}}),
    ("tp2, bf16", 2, {"parallel": {"tensor_model_parallel_size": 2}, "training": {"precision": "bf16"}}),
    ("tp2, sequence parallel", 2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    (
        "tp2, whole optimizer",
        2,
        {"parallel": {"tensor_model_parallel_size": 2, "use_distributed_optimizer": False}},
    ),
    (
        "tp2, sequence parallel, latents regressed",
        2,
        {
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "loss": {"latent_regression_loss_weight": 1.0},
        },
    ),
    ("pp2", 2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    (
        "pp2, tied matrix on both stages",
        2,
        {"parallel": {"pipeline_model_parallel_size": 2, "pipeline_cuts": ("language.1",)}},
    ),
    (
        "pp2, two matrices",
        2,
        {
            "parallel": {"pipeline_model_parallel_size": 2, "pipeline_cuts": ("language.1",)},
            "language": {"tie_embeddings": False},
        },
    ),
    ("tp2 x pp2", 4, {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}),
    (
        "tp2 x pp2, sequence parallel, inside the ViT",
        4,
        {
            "parallel": {
                "tensor_model_parallel_size": 2,
                "pipeline_model_parallel_size": 2,
                "pipeline_cuts": ("vision.1",),
                "sequence_parallel": True,
            }
        },
    ),
    ("dp2 x pp2", 4, {"parallel": {"pipeline_model_parallel_size": 2, "pipeline_cuts": ("language.1",)}}),
    ("dp2 x tp2, sequence parallel", 4, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    (
        "dp2 x tp2, sequence parallel, no class token",
        4,
        {
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "vision": {"class_token": False, "layer_scale_init": None},
        },
    ),
]


def layout(**sizes: Any) -> dict[str, Any]:
    """Return the ``parallel`` section of sizes by short names; other names as they are."""
    names = {f"{axis[0]}p": f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context")}
    return {"parallel": {names.get(name, name): value for name, value in sizes.items()}}


SPLIT = {"tp": 2, "sequence_parallel": True}
GLOBAL = {"loss": {"contrastive_scope": "global"}}
KEPT = {"loss": {"contrastive_scope": "global", "contrastive_keep_graphs": True}}
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
PLAIN = {"layer_scale_init": None}

GLOBAL_CASES: list[Case] = [
    ("global, dp2", 2, GLOBAL),
    ("global, dp4", 4, {**GLOBAL, "training": {"micro_batch_size": 1}}),
    ("global, one micro-batch", 2, {**GLOBAL, "training": {"micro_batch_size": 4}}),
    ("global, no weight", 2, {"loss": {"contrastive_scope": "global", "contrastive_loss_weight": 0.0}}),
    ("global, dp2, overlapped gather", 2, {**GLOBAL, **layout(overlap_param_gather=True)}),
    ("global, pp2", 2, {**GLOBAL, **layout(pp=2)}),
    ("global, tp2", 2, {**GLOBAL, **layout(tp=2)}),
    (
        "global, tp2, sequence parallel, latents regressed",
        2,
        {"loss": {"contrastive_scope": "global", "latent_regression_loss_weight": 1.0}, **layout(**SPLIT)},
    ),
    ("global, tp2 x pp2", 4, {**GLOBAL, **layout(tp=2, pp=2)}),
    ("global, dp2 x pp2", 4, {**GLOBAL, **layout(pp=2, pipeline_cuts=("language.1",))}),
    ("graphs kept, dp2", 2, KEPT),
    ("graphs kept, tp2", 2, {**KEPT, **layout(tp=2)}),
    ("graphs kept, dp2 x tp2, sequence parallel", 4, {**KEPT, **layout(**SPLIT)}),
]

RECOMPUTE_CASES: list[Case] = [
    ("full, tp2", 2, {"vision": FULL, "language": FULL, **layout(tp=2)}),
    ("full, tp2, sequence parallel", 2, {"vision": FULL, "language": FULL, **layout(**SPLIT)}),
    ("full, tp2, plain ViT", 2, {"vision": {**FULL, **PLAIN}, **layout(tp=2)}),
    ("full, tp2, sequence parallel, plain ViT", 2, {"vision": {**FULL, **PLAIN}, **layout(**SPLIT)}),
    ("full, tp2, plain ViT with drop-path", 2, {"vision": {**FULL, **PLAIN, "drop_path_rate": 0.4}, **layout(tp=2)}),
    (
        "full, one layer of each, tp2 x pp2, global",
        4,
        {
            "vision": {**FULL, "recompute_num_layers": 1},
            "language": {**FULL, "recompute_num_layers": 1},
            **GLOBAL,
            **layout(tp=2, pp=2),
        },
    ),
    ("selective, tp2", 2, {"vision": SELECTIVE, "language": {**SELECTIVE, "activation": "gelu"}, **layout(tp=2)}),
    ("selective, tp2, sequence parallel", 2, {"vision": SELECTIVE, "language": SELECTIVE, **layout(**SPLIT)}),
    ("subset, tp2", 2, {"vision": {"drop_path_rate": 0.4, "drop_path_mode": "subset"}, **layout(tp=2)}),
    (
        "subset, full, tp2, plain ViT",
        2,
        {"vision": {"drop_path_rate": 0.4, "drop_path_mode": "subset", **FULL, **PLAIN}, **layout(tp=2)},
    ),
]

CONTEXT_CASES: list[Case] = [
    ("cp2", 2, layout(cp=2)),
    (
        "cp2, bf16, chunks",
        2,
        {**layout(cp=2), "training": {"precision": "bf16"}, "loss": {"cross_entropy_chunk_size": 7}},
    ),
    ("cp2, whole optimizer", 2, layout(cp=2, use_distributed_optimizer=False)),
    ("cp2, full", 2, {"vision": FULL, "language": FULL, **layout(cp=2)}),
    ("cp4", 4, layout(cp=4)),
    ("cp2 x dp2", 4, layout(cp=2)),
    ("cp2 x dp2, global", 4, {**GLOBAL, **layout(cp=2)}),
    ("cp2 x dp2, graphs kept", 4, {**KEPT, **layout(cp=2)}),
    ("cp2 x tp2", 4, layout(cp=2, tp=2)),
    ("cp2 x tp2, sequence parallel, full", 4, {"vision": FULL, "language": FULL, **layout(cp=2, **SPLIT)}),
    ("cp2 x tp2, subset", 4, {"vision": {"drop_path_rate": 0.4, "drop_path_mode": "subset"}, **layout(cp=2, tp=2)}),
    ("cp2 x pp2", 4, layout(cp=2, pp=2)),
    ("cp2 x pp2, inside the ViT, global", 4, {**GLOBAL, **layout(cp=2, pp=2, pipeline_cuts=("vision.1",))}),
    ("cp2 x pp2, tied matrix on both stages", 4, layout(cp=2, pp=2, pipeline_cuts=("language.1",))),
]

CASES = LAYOUT_CASES + GLOBAL_CASES + RECOMPUTE_CASES + CONTEXT_CASES


@pytest.mark.parametrize(("name", "world_size", "changes"), CASES, ids=[case[0] for case in CASES])
def test_calls_and_bytes_of_a_training_step(
    corpus: Path, name: str, world_size: int, changes: dict[str, dict[str, Any]]
) -> None:
    changes = {**changes, "training": {"global_batch_size": 8, "micro_batch_size": 2, **changes.get("training", {})}}
    results = run_distributed(count_and_predict, world_size, small_config(corpus, **changes))
    for rank, steps in enumerate(results):
        for step, (counted, predicted) in enumerate(steps):
            assert predicted == counted, f"rank {rank}, step {step}"
    # Nothing is equal because nothing was seen.
    assert bool(results[0][0][0]) == (world_size > 1)
