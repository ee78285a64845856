"""Steps that are skipped.

Oracles: a run in which the step is left out by hand, compared bit by bit in weights, float32 values, moments and Adam's
step, on every rank; the loader's own tensors and the shard on disk for what a skipped step had read; exit of the loop
and what it left on disk.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from lcl_megatron.config import RunConfig
from lcl_megatron.model.lcl import LCLOutput
from lcl_megatron.parallel.engine import Engine
from lcl_megatron.parallel.parameter_hash import ReplicaMismatchError
from lcl_megatron.training.loop import train
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import NonFiniteError, train_step
from tests.distributed import run_distributed
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config

SKIPPED = 2
"""Index of the step that goes wrong, of five."""
STEPS = 5
Fault = Callable[[Run, list[int]], Any]
"""A context in which the step whose index stands in the list's only place goes wrong on some rank."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = DataFolder(tmp_path_factory.mktemp("skipped") / "data")
    folder.write([plain_document(number) for number in range(12)])
    folder.preprocess()
    return folder


def config_of(data: DataFolder, **sections: dict[str, Any]) -> RunConfig:
    sections.setdefault("training", {})["train_iters"] = STEPS
    return small_config(data.corpus, **sections)


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().copy()


def everything(run: Run) -> dict[str, np.ndarray]:
    """Weights, and all that the optimizer of this rank holds, as bytes."""
    with run.engine.whole_parameters():
        state = {name: bits(p) for model in run.engine.models for name, p in model.named_parameters()}
    (part,) = run.trainable.optimizer.chained_optimizers
    for group_number, group in enumerate(part.optimizer.param_groups):
        state[f"group {group_number} step"] = np.asarray(group.get("step", 0))
        for number, parameter in enumerate(group["params"]):
            where = f"group {group_number} parameter {number}"
            state[where] = bits(parameter)
            held = part.optimizer.state[parameter]
            assert {"exp_avg", "exp_avg_sq"} <= held.keys()
            state |= {f"{where} {name}": bits(torch.as_tensor(value)) for name, value in held.items()}
    return state


def gradient_of(rank: int, copy: bool = False, value: float = np.nan) -> Fault:
    """One entry of one parameter's gradient goes wrong on one rank; ``copy`` = of one that tp ranks hold whole."""

    @contextmanager
    def fault(run: Run, now: list[int]) -> Iterator[None]:
        if run.engine.groups.rank == rank:
            wants_split = run.engine.groups.tp_size > 1 and not copy
            parameters = run.engine.models[0].parameters()
            chosen = [p for p in parameters if getattr(p, "tensor_model_parallel", False) == wants_split]

            def spoil(gradient: Tensor) -> Tensor:
                spoilt = gradient.clone()
                spoilt.view(-1)[0] = value if now == [SKIPPED] else spoilt.view(-1)[0]
                return spoilt

            chosen[0].register_hook(spoil)
        yield

    return fault


def loss_of(rank: int, value: float = np.nan) -> Fault:
    """The next-token loss has no value on one rank, while its gradient is as ever."""

    @contextmanager
    def fault(run: Run, now: list[int]) -> Iterator[None]:
        plain = Engine.forward_backward

        def spoilt(self: Engine, micro_batches: Any, loss_function: Any, *rest: Any, **named: Any) -> list[Any]:
            def without_value(micro_batch: int, output: LCLOutput) -> Any:
                if now == [SKIPPED] and self.groups.rank == rank:
                    output = dataclasses.replace(output, token_losses_K=output.token_losses_K + value)
                return loss_function(micro_batch, output)

            return plain(self, micro_batches, without_value, *rest, **named)

        with patch.object(Engine, "forward_backward", spoilt):
            yield

    return fault


@contextmanager
def nothing(run: Run, now: list[int]) -> Iterator[None]:
    """Nothing goes wrong."""
    yield


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


def nan_from(first: int, last: int = STEPS) -> Fault:
    """Every gradient of some steps, by index, is no number."""

    @contextmanager
    def fault(run: Run, now: list[int]) -> Iterator[None]:
        parameter = next(iter(run.engine.models[0].parameters()))
        parameter.register_hook(lambda gradient: gradient * (np.nan if first <= now[0] <= last else 1.0))
        yield

    return fault


@contextmanager
def training(config: RunConfig, fault: Fault) -> Iterator[Run]:
    """A run whose loop the test calls, with a fault at the steps that its loader hands out."""
    with run_from(config) as run:
        now = [0]
        batches = run.loader

        class Counted:
            def __iter__(self) -> Iterator[Any]:
                for batch in batches:
                    now[0] = batch.step
                    yield batch

        run.loader = Counted()  # type: ignore[assignment]
        with fault(run, now):
            yield run


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_too_many_skipped_steps_in_a_row_end_the_run(data: DataFolder, tmp_path: Path, limit: int) -> None:
    sections = {"checkpoint": {"save": str(tmp_path), "save_interval": 1}, "guard": {"max_skipped_steps": limit}}
    steps = [f"step {number}: gradient norm nan" for number in range(2, limit + 3)]
    with (
        training(config_of(data, **sections), nan_from(1)) as run,
        pytest.raises(NonFiniteError, match=f"^{'; '.join(steps)}[.] .*guard.max_skipped_steps = {limit}[.].*--lr"),
    ):
        train(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["skipped", "step-00000001"]
    assert len(list((tmp_path / "skipped").iterdir())) == limit + 1


def test_a_step_that_is_taken_begins_the_count_anew(data: DataFolder, tmp_path: Path) -> None:
    log = {"log_dir": str(tmp_path), "log_interval": 5}
    config = config_of(data, guard={"max_skipped_steps": 1}, logging=log)

    @contextmanager
    def every_other(run: Run, now: list[int]) -> Iterator[None]:
        parameter = next(iter(run.engine.models[0].parameters()))
        parameter.register_hook(lambda gradient: gradient * (np.nan if now[0] % 2 else 1.0))
        yield

    with training(config, every_other) as run:
        train(run)
        assert (run.progress.step, run.progress.consumed_rows) == (5, 20)
    (report,) = read_reports(tmp_path)
    assert report["guard/skipped_steps"] == 2
    assert all(isinstance(value, int | float) for value in report.values())


def test_reports_leave_out_the_losses_of_skipped_steps(data: DataFolder, tmp_path: Path) -> None:
    log = {"log_dir": str(tmp_path), "log_interval": 2}
    generation: list[float] = []
    with training(config_of(data, logging=log), loss_of(0)) as run:
        train(run)
    with run_from(config_of(data)) as run:
        for batch in run.loader:
            if batch.step == SKIPPED:
                run.trainable.scheduler.step(1)
                continue
            generation.append(float(train_step(run, batch).losses[0].generation_loss))
    reports = read_reports(tmp_path)
    assert [report["guard/skipped_steps"] for report in reports] == [0, 1, 1]
    assert reports[0]["loss/generation"] == pytest.approx(sum(generation[:2]) / 2)
    assert reports[1]["loss/generation"] == pytest.approx(generation[2])
    assert reports[1]["perf/images_per_s"] > 0


def test_a_report_of_nothing_but_skipped_steps_has_no_losses(data: DataFolder, tmp_path: Path) -> None:
    with training(config_of(data, logging={"log_dir": str(tmp_path), "log_interval": 1}), nan_from(1, 1)) as run:
        train(run)
    kept = [{name for name in report if name.startswith(("loss/", "features/"))} for report in read_reports(tmp_path)]
    assert kept[1] == set()
    assert kept[0] == kept[2] != set()
    assert read_reports(tmp_path)[1]["data/consumed_rows"] == 8


def _skip_on_two(rank: int, world_size: int, config: RunConfig) -> list[Any]:
    """Train with a NaN on rank 1; return what this rank's loader had handed out at the skipped step."""
    with training(config, gradient_of(1)) as run:
        read: list[Any] = []
        batches = run.loader

        class Kept:
            def __iter__(self) -> Iterator[Any]:
                for batch in batches:
                    if batch.step == SKIPPED:
                        read.extend(micro.image_keys.tolist() for micro in batch.micro_batches)
                    yield batch

        run.loader = Kept()  # type: ignore[assignment]
        train(run)
    return read


def test_the_sources_of_a_skipped_step_are_listed(data: DataFolder, tmp_path: Path) -> None:
    sections = {"training": {"micro_batch_size": 1}, "checkpoint": {"save": str(tmp_path)}}
    read = run_distributed(_skip_on_two, 2, config_of(data, **sections))
    assert [path.name for path in (tmp_path / "skipped").iterdir()] == ["step-00000003.json"]
    record = json.loads((tmp_path / "skipped" / "step-00000003.json").read_text())
    assert (record["step"], record["grad_norm"], record["consumed_rows"]) == (3, "nan", 8)
    listed = {(part["dp_rank"], part["micro_batch"]): part["rows"] for part in record["micro_batches"]}
    assert listed.keys() == {(rank, number) for rank in range(2) for number in range(2)}
    for (rank, number), rows in listed.items():
        assert [image["key"] for row in rows for image in row["images"]] == read[rank][number]
    rows = [row for part in listed.values() for row in part]
    assert sorted(row["row"] for row in rows) == [8, 9, 10, 11]
    lines = data.shard.read_text().splitlines()
    for row in rows:
        assert row["documents"]
        for document in row["documents"]:
            name, line = document.rsplit(":", 1)
            assert name == data.shard.name
            names = {info["image_name"] for info in json.loads(lines[int(line) - 1])["image_info"]}
            # Every image of the row is one of its documents'.
            shown = [image["source"] for image in row["images"] if image["source"].startswith(f"{document} ")]
            assert 1 <= len(shown) <= len(names)  # what does not fit the row is cut off
            assert all(any(f"({name})" in source for name in names) for source in shown)


@pytest.mark.parametrize("place", ["save", "log_dir", "nowhere", "a file"])
def test_the_log_says_where_the_sources_are(
    data: DataFolder, tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").write_text("")
    sections: dict[str, dict[str, Any]] = {
        "save": {"checkpoint": {"save": str(tmp_path / "save")}, "logging": {"log_dir": str(tmp_path / "log")}},
        "log_dir": {"logging": {"log_dir": str(tmp_path / "log_dir")}},
        "nowhere": {},
        "a file": {"checkpoint": {"save": str(tmp_path / "a file"), "save_interval": 100}},
    }[place]
    with training(config_of(data, **sections), nan_from(1, 1)) as run:
        batches = iter(run.loader)
        train_step(run, next(batches))
        with caplog.at_level(logging.WARNING):
            train_step(run, next(batches))
    path = tmp_path / place / "skipped" / "step-00000002.json"
    expected = {
        "nowhere": "set --save or --log-dir to have its sources listed",
        "a file": "its sources could not be listed: ",
    }.get(place, f"its sources: {path}")
    assert f"step 2 skipped on all ranks: gradient norm nan; {expected}" in caplog.text
    assert path.exists() == (place in ("save", "log_dir"))


SPIKE = 9
"""Index of the step with a spike, of 14."""


@contextmanager
def spike(run: Run, now: list[int]) -> Iterator[None]:
    """One step's gradient is a hundred times what it should be."""
    for model in run.engine.models:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * (100.0 if now == [SPIKE] else 1.0))
    yield


@pytest.mark.parametrize("stop", [6, SPIKE, SPIKE + 1, 12])
def test_a_spike_is_one_skipped_step_also_after_a_restart(data: DataFolder, tmp_path: Path, stop: int) -> None:
    guard = {"spike_threshold": 20.0, "spike_window": 8}
    config = small_config(data.corpus, training={"train_iters": 14}, guard=guard)
    with training(config, spike) as run:
        train(run)
        expected, state = everything(run), run.guard.state_dict()
    assert run.guard.skipped_steps == 1
    assert len(state["window"]) == 8

    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save=str(tmp_path)))
    with training(
        dataclasses.replace(config, logging=dataclasses.replace(config.logging, exit_interval=stop)), spike
    ) as run:
        train(run)
        saved = json.dumps(run.guard.state_dict(), allow_nan=False)
    with training(config, spike) as run:
        assert run.progress.step == stop
        run.guard.load_state_dict(json.loads(saved))
        train(run)
        assert run.guard.state_dict() == state
        found = everything(run)
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name
    skipped = [path.name for path in (tmp_path / "skipped").iterdir()]
    assert skipped == [f"step-{SPIKE + 1:08d}.json"]
    record = json.loads((tmp_path / "skipped" / skipped[0]).read_text())
    assert record["grad_norm"] > 20
    assert record["reason"].startswith("gradient norm ")
    assert "a spike: above 20 median absolute deviations" in record["reason"]


def _flip_between_steps(rank: int, world_size: int, config: RunConfig) -> str:
    """Flip a bit of a weight of rank 1 behind step 3; return how the run ends."""
    with run_from(config) as run:
        batches = run.loader

        class Flipping:
            def __iter__(self) -> Iterator[Any]:
                for batch in batches:
                    if batch.step == 3 and rank == 1:
                        weight = list(run.engine.models[0].parameters())[-1].detach().view(-1)
                        weight.view(torch.int32)[0] ^= 1 << 20
                    yield batch

        run.loader = Flipping()  # type: ignore[assignment]
        with pytest.raises(ReplicaMismatchError) as caught:
            train(run)
        assert run.guard.state_dict()["replicas_agreed_step"] == 2
        return str(caught.value)


def test_replicas_are_compared_at_their_interval_before_anything_is_saved(data: DataFolder, tmp_path: Path) -> None:
    config = small_config(
        data.corpus,
        training={"global_batch_size": 3, "micro_batch_size": 1},
        parallel={"use_distributed_optimizer": False},
        guard={"compare_replicas_interval": 2},
        checkpoint={"save": str(tmp_path), "save_interval": 1},
    )
    for said in run_distributed(_flip_between_steps, 3, config):
        assert said.startswith(
            "step 4: replicas of the same weights differ (equal after step 2): rank 1 (dp1 pp0 tp0) differs from the 2 "
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]
