"""Steps that are skipped, on every layout.

Oracle: a run in which the step is left out by hand, compared bit by bit in weights, float32 values, moments and Adam's
step, on every rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lcl_megatron.config import RunConfig
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step
from tests.distributed import run_distributed
from tests.training.faults import SKIPPED, STEPS, Fault, config_of, everything, gradient_of, loss_of, nothing
from tests.training.small_runs import DataFolder, plain_document


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = DataFolder(tmp_path_factory.mktemp("skipped") / "data")
    folder.write([plain_document(number) for number in range(12)])
    folder.preprocess()
    return folder


def run_with(config: RunConfig, fault: Fault) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Train with a step that goes wrong, or is left out if nothing does; return the state and what was skipped."""
    skips: list[Any] = []
    now = [0]
    with run_from(config) as run, fault(run, now):
        for batch in run.loader:
            now[0] = batch.step
            if fault is nothing and batch.step == SKIPPED:
                run.trainable.scheduler.step(1)
                continue
            before = run.trainable.optimizer.param_groups[0]["lr"]
            result = train_step(run, batch)
            assert result.learning_rate != before or batch.step == 0
            skips.append(None if result.skip is None else (result.skip.step, result.skip.reason))
        return everything(run), skips


def skip_and_leave_out(rank: int, world_size: int, config: RunConfig, fault: Fault) -> list[Any]:
    skipped, skips = run_with(config, fault)
    left_out, none = run_with(config, nothing)
    assert none == [None] * (STEPS - 1)
    assert skipped.keys() == left_out.keys()
    for name, value in left_out.items():
        assert np.array_equal(skipped[name], value), name
    assert sum(np.isnan(value.view(np.float32)).sum() for name, value in left_out.items() if "exp" in name) == 0
    return skips


DP2 = {"training": {"micro_batch_size": 1}}
TP2_PP2 = {"parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}


@pytest.mark.parametrize(
    ("world_size", "sections", "fault"),
    [
        pytest.param(1, {}, gradient_of(0), id="one process, gradient"),
        pytest.param(1, {"training": {"precision": "bf16"}}, loss_of(0, np.inf), id="one process, bf16, infinite loss"),
        pytest.param(2, DP2, gradient_of(1), id="dp2, gradient on rank 1"),
        pytest.param(2, DP2, loss_of(1), id="dp2, loss on rank 1"),
        pytest.param(
            2,
            {"training": {"precision": "bf16"}, "parallel": {"overlap_param_gather": True}},
            gradient_of(0, value=-np.inf),
            id="dp2, bf16, late parameters, infinite gradient on rank 0",
        ),
        pytest.param(
            2,
            {"training": {"precision": "bf16"}, "parallel": {"use_distributed_optimizer": False}},
            loss_of(0),
            id="dp2, bf16, whole optimizer on each, loss on rank 0",
        ),
        pytest.param(
            2,
            {"training": {"micro_batch_size": 1}, "loss": {"contrastive_scope": "global"}},
            loss_of(1),
            id="dp2, contrast of the whole batch, loss on rank 1",
        ),
        pytest.param(4, TP2_PP2, gradient_of(1, copy=True), id="tp2 x pp2, copy of a parameter on rank 1"),
        pytest.param(4, TP2_PP2, loss_of(3), id="tp2 x pp2, loss on rank 3"),
        pytest.param(
            4,
            {"parallel": TP2_PP2["parallel"] | {"use_distributed_optimizer": False}},
            gradient_of(0),
            id="tp2 x pp2, whole optimizer, gradient on rank 0",
        ),
        pytest.param(2, {"parallel": {"context_parallel_size": 2}}, loss_of(1), id="cp2, loss on rank 1"),
    ],
)
def test_a_skipped_step_leaves_what_a_run_without_it_leaves(
    data: DataFolder, world_size: int, sections: dict[str, dict[str, Any]], fault: Fault
) -> None:
    sections = {name: dict(fields) for name, fields in sections.items()}
    if world_size == 2:
        sections.setdefault("training", {}).setdefault("micro_batch_size", 2)
    skips = run_distributed(skip_and_leave_out, world_size, config_of(data, **sections), fault)
    for found in skips:
        assert found == [None, None, (SKIPPED + 1, "gradient norm nan"), None, None] or (
            found[SKIPPED] == (SKIPPED + 1, "gradient norm inf") and found.count(None) == STEPS - 1
        )
