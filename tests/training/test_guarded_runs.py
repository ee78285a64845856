"""Runs in which steps are skipped, or replicas differ: how they go on, what they report, save and say.

Oracles: what is left on disk; the loader's own tensors and the shard for what a skipped step had read; a run that was
not interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.checkpoint.saver import SaveError
from lcl_megatron.config import RunConfig
from lcl_megatron.parallel.parameter_hash import ReplicaMismatchError
from lcl_megatron.training.loop import train
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import NonFiniteError, train_step
from tests.distributed import run_distributed
from tests.training.faults import SKIPPED, config_of, everything, gradient_of, loss_of, nan_from, training
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = DataFolder(tmp_path_factory.mktemp("skipped") / "data")
    folder.write([plain_document(number) for number in range(12)])
    folder.preprocess()
    return folder


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_too_many_skipped_steps_in_a_row_end_the_run(data: DataFolder, tmp_path: Path, limit: int) -> None:
    sections = {"checkpoint": {"save": str(tmp_path), "save_interval": 1}, "guard": {"max_skipped_steps": limit}}
    steps = [f"step {number}: gradient norm nan" for number in range(2, limit + 3)]
    row = f": {limit + 1} skipped steps in a row" if limit else ""
    with (
        training(config_of(data, **sections), nan_from(1)) as run,
        pytest.raises(
            NonFiniteError, match=f"^{'; '.join(steps)}{row}, and guard.max_skipped_steps = {limit}[.] .*--lr"
        ),
    ):
        train(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["skipped", "step-00000001"]
    assert len(list((tmp_path / "skipped").iterdir())) == limit + 1


def test_a_checkpoint_that_cannot_be_written_does_not_hide_why_the_run_ends(
    data: DataFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sections = {"checkpoint": {"save": str(tmp_path), "save_interval": 1}, "guard": {"max_skipped_steps": 0}}
    (tmp_path / "step-00000001").touch()
    with training(config_of(data, **sections), nan_from(1)) as run, pytest.raises(NonFiniteError, match="norm nan"):
        train(run)
    assert "the last checkpoint could not be written" in caplog.text


@pytest.mark.parametrize("is_named", [True, False])
def test_a_run_does_not_save_into_a_checkpoint(data: DataFolder, tmp_path: Path, is_named: bool) -> None:
    """The next start would go on from that one again, whatever had been saved in it."""
    save = tmp_path / "root"
    with run_from(config_of(data, checkpoint={"save": str(save)})) as run:
        train(run)
    (inner,) = save.glob("step-*")
    inner = inner if is_named else inner.rename(save / "best")
    before = sorted(inner.iterdir())
    with (
        pytest.raises(SaveError, match=r"it is a checkpoint, by its name or its run.toml; give the folder that holds"),
        run_from(config_of(data, checkpoint={"save": str(inner)})),
    ):
        pass
    assert sorted(inner.iterdir()) == before


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
    (tmp_path / "a file").mkdir()
    (tmp_path / "a file" / "skipped").write_text("")
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
    assert path.is_file() == (place in ("save", "log_dir"))


SPIKE = 9
"""Index of the step with a spike, of 14."""


@contextmanager
def spike(run: Run, now: list[int]) -> Iterator[None]:
    """One step's gradient is a hundred times what it should be."""
    for model in run.engine.models:
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient * (100.0 if now == [SPIKE] else 1.0))
    yield


def test_spikes_that_go_on_end_the_run(data: DataFolder) -> None:
    guard = {"spike_threshold": 20.0, "spike_window": 8, "max_skipped_steps": 1}
    config = small_config(data.corpus, training={"train_iters": 14}, guard=guard)

    @contextmanager
    def from_then_on(run: Run, now: list[int]) -> Iterator[None]:
        for parameter in run.engine.models[0].parameters():
            parameter.register_hook(lambda gradient: gradient * (100.0 if now[0] >= SPIKE else 1.0))
        yield

    steps = f"^step {SPIKE + 1}: .* a spike: .*; step {SPIKE + 2}: .* a spike: .*: 2 skipped steps in a row"
    with (
        training(config, from_then_on) as run,
        pytest.raises(NonFiniteError, match=f"{steps}.*raise --spike-threshold"),
    ):
        train(run)


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
    # That of step 3 was still being written; it may hold the difference, so nobody waits for it.
    assert {"step-00000001", "step-00000002"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "step-00000004").exists()
