"""The loop around the steps: reports, checkpoints, stopping; and what the launcher sees of it.

Oracles: the files that a run leaves, read by other code (json, TensorBoard's own reader); exit statuses; an
uninterrupted run.
"""

from __future__ import annotations

import logging
import runpy
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lcl_megatron.checkpoint.folders import read_config
from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import to_toml
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config, train_and_read

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
"""How long a process may take for what takes seconds on an idle machine."""

REPORTED = {
    "loss/total",
    "loss/generation",
    "loss/contrastive",
    "contrast/image_to_context_accuracy",
    "contrast/context_to_image_accuracy",
    "contrast/num_pairs",
    "contrast/num_negatives",
    "contrast/num_same_image",
    "contrast/num_same_context",
    "contrast/num_empty_context",
    "contrast/pair_similarity",
    "contrast/background_similarity",
    "contrast/logit_scale",
    "features/pooled_std",
    "features/pooled_effective_rank",
    "features/context_std",
    "features/context_effective_rank",
    "optimizer/learning_rate",
    "optimizer/grad_norm",
    "perf/images_per_s",
    "perf/tokens_per_s",
    "perf/step_ms",
    "perf/data_wait_ms",
    "perf/slowest_rank_ms",
    "perf/median_rank_ms",
    "perf/tflops_per_device",
    "data/bad_images",
    "data/consumed_rows",
    "data/consumed_images",
    "data/fill",
    "guard/skipped_steps",
}
"""Names are an interface: dashboards and ``plot_curves`` read them."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("loop") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_a_run_leaves_reports_curves_and_checkpoints(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logs, save = tmp_path / "logs", tmp_path / "save"
    config = small_config(
        corpus, logging={"log_dir": str(logs), "log_interval": 3}, checkpoint={"save": str(save), "save_interval": 5}
    )
    with caplog.at_level(logging.INFO):
        reports = train_and_read(config)

    assert [report["step"] for report in reports] == [3, 6, 8]
    for report in reports:
        assert report.keys() == REPORTED | {"step", "time"}
    assert saved_steps(save) == [5, 8]
    assert read_config(save / "step-00000008").data == config.data
    assert "loss/generation" in (logs / "curves.html").read_text()
    events = EventAccumulator(str(logs / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == REPORTED
    found = [(event.step, event.value) for event in events.Scalars("loss/generation")]
    assert found == [(report["step"], pytest.approx(report["loss/generation"])) for report in reports]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 3
    assert "step 8/8" in lines[-1]
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert "train_iters       = 8    (default 250000)" in messages
    assert "12 documents, 24 images: " in messages
    assert f"saved {save / 'step-00000005'}" in messages


def test_nothing_is_written_without_a_place_for_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with run_from(small_config(corpus, training={"train_iters": 3}, checkpoint={"save_interval": 1})) as run:
        train(run)
        assert run.progress.step == 3
    assert list(tmp_path.iterdir()) == []


def test_exit_interval_stops_and_the_next_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    def config(name: str, exit_interval: int) -> RunConfig:
        return small_config(
            corpus,
            logging={"log_dir": str(tmp_path / name), "exit_interval": exit_interval},
            checkpoint={"save": str(tmp_path / name / "save")},
        )

    first = train_and_read(config("parts", 3))
    assert [report["step"] for report in first] == [1, 2, 3]
    assert saved_steps(tmp_path / "parts" / "save") == [3]
    assert [report["step"] for report in train_and_read(config("parts", 3))] == [1, 2, 3, 4, 5, 6]
    parts = train_and_read(config("parts", 3))
    whole = train_and_read(config("whole", 0))
    assert saved_steps(tmp_path / "whole" / "save") == [8]
    clocks = ("perf/", "time")
    for part, report in zip(parts, whole, strict=True):
        assert {k: v for k, v in part.items() if not k.startswith(clocks)} == {
            k: v for k, v in report.items() if not k.startswith(clocks)
        }


def test_a_finished_run_started_again_does_nothing(corpus: Path, tmp_path: Path) -> None:
    save = {"save": str(tmp_path / "save")}
    train_and_read(small_config(corpus, checkpoint=save, logging={"log_dir": str(tmp_path / "logs")}))
    for logs in ("logs", "other"):
        reports = train_and_read(small_config(corpus, checkpoint=save, logging={"log_dir": str(tmp_path / logs)}))
        assert len(reports) == (8 if logs == "logs" else 0)
    assert saved_steps(tmp_path / "save") == [8]


# What the launcher sees.


def run_script(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Run pretrain_lcl.py in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["pretrain_lcl.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "pretrain_lcl.py"), run_name="__main__")
    return caught.value.code


def test_help_lists_the_settings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(["--help"], monkeypatch) == 0
    output = capsys.readouterr().out
    for flag in ("--preset", "--data-path", "--train-iters", "--vision.num-layers", "--tensor-model-parallel-size"):
        assert flag in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--preset", "vit_h99"], ["--preset vit_h99: there is no such preset; known:", "tiny", "vit_l14_opt125m"]),
        (["--preset", "tiny"], ["data.data_path is empty", "--data-path"]),
        (["--preset", "tiny", "--data-path", "nowhere"], ["no corpus at nowhere", "tools/preprocess_data.py"]),
        (["--preset", "tiny", "--global-batch-size", "7"], ["training.global_batch_size = 7", "set --global-batch"]),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    arguments: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(arguments, monkeypatch) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for part in expected:
        assert part in lines[0]


def test_a_run_through_the_script_ends_with_status_0(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(to_toml(small_config(corpus)))
    arguments = ["--config", str(tmp_path / "run.toml"), "--train-iters", "3", "--log-dir", str(tmp_path / "logs")]
    assert run_script(arguments, monkeypatch) == 0
    assert [report["step"] for report in read_reports(tmp_path / "logs")] == [1, 2, 3]
