"""The model on all ranks. Oracles: a single process without DDP and schedule; counts by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.config import ConfigError, ParallelConfig, RunConfig
from lcl_megatron.model.initialization import initialize_weights
from lcl_megatron.model.lcl import LCLModel, LCLOutput
from lcl_megatron.model.specs import Runtime
from lcl_megatron.parallel import engine as engines
from tests.batches import Document, make_rows, merge
from tests.distributed import RankError, run_distributed

ROWS: list[list[Document]] = [[(30, (3,)), (34, (0, 10))], [(64, ())], [(50, (20,))], [(20, ()), (44, (1, 30))]]
STEP = 4


def _loss(output: LCLOutput) -> torch.Tensor:
    return output.token_losses_K.sum() + output.pooled_ND.square().sum() + output.context_ND.sum() * output.logit_scale


def _run(rank: int, world_size: int, config: RunConfig, forward_only: bool) -> dict[str, Any]:
    groups = engines.start(config)
    engine = engines.build_engine(config, groups)
    rows = make_rows(config, ROWS)
    batches = [merge(rows[i : i + 2]) for i in (0, 2)]
    engine.zero_gradients()

    def loss(index: int, output: LCLOutput) -> tuple[torch.Tensor, tuple[int, float]]:
        value = _loss(output)
        return value, (index, float(value.detach()))

    reports = engine.forward_backward(batches, loss, STEP, forward_only=forward_only, whole_gradients=True)
    return {
        "reports": reports,
        "gradients": {n: p.main_grad.numpy().copy() for model in engine.models for n, p in model.named_parameters()},
        "pieces": [stage.pieces for stage in engine.stages],
        "training": all(model.training for model in engine.models),
    }


def _single(config: RunConfig) -> dict[str, Any]:
    """The whole model without DDP and schedule."""

    def run(rank: int, world_size: int) -> dict[str, Any]:
        model = LCLModel(config, Runtime(collection=engines.start(config).collection))
        initialize_weights(model, config.training.seed)
        rows = make_rows(config, ROWS)
        losses = []
        for i in (0, 2):
            loss = _loss(model(merge(rows[i : i + 2]), step=STEP))
            loss.backward()
            losses.append(float(loss.detach()))
        return {"losses": losses, "gradients": {n: p.grad.numpy() for n, p in model.named_parameters()}}

    return run_distributed(run, 1)[0]


def _piped(config: RunConfig) -> RunConfig:
    return dataclasses.replace(
        config, parallel=ParallelConfig(pipeline_model_parallel_size=2, pipeline_cuts=("language.embed",))
    )


def test_gradients_are_summed_and_never_averaged(tiny_run: RunConfig) -> None:
    """Over two micro-batches, and over two data-parallel ranks that are given the same micro-batches."""
    single = _single(tiny_run)
    for world_size in (1, 2):
        for result in run_distributed(_run, world_size, tiny_run, False):
            assert [index for index, _ in result["reports"]] == [0, 1]
            assert [value for _, value in result["reports"]] == pytest.approx(single["losses"], rel=1e-6)
            assert result["training"]
            for name, gradient in single["gradients"].items():
                np.testing.assert_allclose(
                    result["gradients"][name], world_size * gradient, rtol=1e-3, atol=1e-5, err_msg=name
                )


def test_only_the_last_stage_reports(tiny_run: RunConfig) -> None:
    single = _single(tiny_run)
    first, last = run_distributed(_run, 2, _piped(tiny_run), False)
    assert first["reports"] == []
    assert [value for _, value in last["reports"]] == pytest.approx(single["losses"], rel=1e-5)
    assert first["pieces"][-1][-1] == "pool"
    assert last["pieces"][0][0] == "language.embed"


@pytest.mark.parametrize("piped", [False, True])
def test_forward_only_reports_and_leaves_no_gradient(piped: bool, tiny_run: RunConfig) -> None:
    single = _single(tiny_run)
    results = run_distributed(_run, 1 + piped, _piped(tiny_run) if piped else tiny_run, True)
    assert [value for _, value in results[-1]["reports"]] == pytest.approx(single["losses"], rel=1e-5)
    for result in results:
        assert not any(gradient.any() for gradient in result["gradients"].values())


def _interleaved(config: RunConfig) -> RunConfig:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_cuts=("vision.1", "language.embed", "heads"),
    )
    return dataclasses.replace(config, parallel=parallel)


@pytest.mark.parametrize("forward_only", [False, True])
def test_interleaved_stages_take_turns_on_the_ranks(forward_only: bool, tiny_run: RunConfig) -> None:
    """With as few micro-batches as there may be."""
    single = _single(tiny_run)
    first, last = run_distributed(_run, 2, _interleaved(tiny_run), forward_only)
    assert [pieces[0] for pieces in first["pieces"]] == ["vision.embed", "language.embed"]
    assert [pieces[0] for pieces in last["pieces"]] == ["vision.1", "heads"]
    assert first["reports"] == []
    assert [index for index, _ in last["reports"]] == [0, 1]
    assert [value for _, value in last["reports"]] == pytest.approx(single["losses"], rel=1e-5)
    for result in (first, last):
        assert result["training"]
        for name, gradient in result["gradients"].items():
            if forward_only:
                assert not gradient.any(), name
            elif name in single["gradients"] and name != "language.embedding.word_embeddings.weight":
                np.testing.assert_allclose(gradient, single["gradients"][name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_model_is_the_only_part_or_an_error(tiny_run: RunConfig) -> None:
    def refused(rank: int, world_size: int) -> bool:
        config = _interleaved(tiny_run)
        engine = engines.build_engine(config, engines.start(config))
        with pytest.raises(ValueError, match="too many values"):
            _ = engine.model
        return len(engine.models) == 2

    assert run_distributed(refused, 2) == [True, True]


def test_precision_decides_dtypes_and_gradients_stay_float32(tiny_run: RunConfig) -> None:
    config = dataclasses.replace(tiny_run, training=dataclasses.replace(tiny_run.training, precision="bf16"))

    def build(rank: int, world_size: int) -> tuple[set[str], set[str], str]:
        engine = engines.build_engine(config, engines.start(config))
        parameters = dict(engine.model.named_parameters())
        scale = parameters.pop("logit_scale")
        assert scale.dtype == torch.float32
        dtypes = {str(p.dtype) for p in parameters.values()}
        return dtypes, {str(p.main_grad.dtype) for p in parameters.values()}, engine.device.type

    ((dtypes, gradients, _),) = run_distributed(build, 1)
    assert dtypes == {"torch.bfloat16"}
    assert gradients == {"torch.float32"}


def test_layout_that_does_not_divide_the_processes_is_refused(tiny_run: RunConfig) -> None:
    def start(rank: int, world_size: int) -> str:
        with pytest.raises(ConfigError) as refusal:
            engines.start(_piped(tiny_run))
        return str(refusal.value)

    assert "3 processes cannot be split into models of 2" in run_distributed(start, 3)[0]


def test_unknown_cut_is_refused_before_any_group_is_made(tiny_run: RunConfig) -> None:
    config = dataclasses.replace(
        tiny_run, parallel=ParallelConfig(pipeline_model_parallel_size=2, pipeline_cuts=("vision.9",))
    )
    with pytest.raises(ConfigError, match=r"names \['vision\.9'\]; known pieces"):
        engines.start(config)


def test_wrong_rows_per_micro_batch_fail_instead_of_hanging(tiny_run: RunConfig) -> None:
    """Shapes come from the plan: one row where two were planned must not be taken for the planned two."""

    def run(rank: int, world_size: int) -> None:
        config = _piped(tiny_run)
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, pipeline_cuts=("heads",)))
        engine = engines.build_engine(config, engines.start(config))
        engine.forward_backward(make_rows(config, ROWS)[:1], lambda index, output: (_loss(output), None), STEP)

    with pytest.raises(RankError):
        run_distributed(run, 2, timeout=20)
