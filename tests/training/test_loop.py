"""The loop around the steps: reports, checkpoints, stopping; and what the launcher sees of it.

Oracles: the files that a run leaves, read by other code (json, TensorBoard's own reader); exit statuses; an
uninterrupted run.
"""

from __future__ import annotations

import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lcl_megatron.checkpoint import native
from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.toml import to_toml
from lcl_megatron.training.failure import exit_status
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
}
"""Names are an interface: dashboards and ``plot_curves`` read them."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("loop") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


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
    assert native.read_config(save / "step-00000008").data == config.data
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


def test_sigterm_is_given_back_after_the_run(corpus: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with run_from(small_config(corpus)) as run:
        os.kill(os.getpid(), signal.SIGTERM)
        train(run)
        assert run.progress.step == 1
    assert signal.getsignal(signal.SIGTERM) == before


# What the launcher sees.


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"ended with status {process.returncode}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < end, f"nothing happened:\n{log.read_text()[-4000:]}"
        time.sleep(0.1)


def start(config: RunConfig, folder: Path, *launcher: str) -> tuple[subprocess.Popen[str], Path]:
    """Start pretrain_lcl.py in a process group of its own and wait until it has trained two steps."""
    (folder / "run.toml").write_text(to_toml(config))
    log = folder / "output"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "pretrain_lcl.py"), "--config", str(folder / "run.toml")],
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
    metrics = Path(config.logging.log_dir) / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, process, log)
    return process, log


def endless(corpus: Path, folder: Path, num_workers: int, micro_batch_size: int) -> RunConfig:
    return small_config(
        corpus,
        data={"num_workers": num_workers},
        training={"train_iters": 1_000_000, "micro_batch_size": micro_batch_size},
        checkpoint={"save": str(folder / "save")},
        logging={"log_dir": str(folder / "logs")},
    )


def check_stopped(process: subprocess.Popen[str], log: Path, folder: Path) -> None:
    """The run ended well, right after the step in which it was asked to, with a checkpoint of that step."""
    try:
        status = process.wait(PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, log.read_text()[-4000:]
    last = read_reports(folder / "logs")[-1]["step"]
    assert saved_steps(folder / "save") == [last]
    assert (folder / "logs" / "curves.html").exists()
    assert "Traceback" not in log.read_text()


def test_sigterm_to_one_of_two_ranks_stops_both_with_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    config = endless(corpus, tmp_path, num_workers=0, micro_batch_size=2)
    process, log = start(config, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    children = psutil.Process(process.pid).children()
    ranks = [child for child in children if str(ROOT / "pretrain_lcl.py") in child.cmdline()]
    assert len(ranks) == 2
    ranks[-1].send_signal(signal.SIGTERM)
    check_stopped(process, log, tmp_path)


def test_sigterm_to_the_whole_job_while_the_loader_decodes(tmp_path: Path) -> None:
    """As Slurm sends it: to all processes of the group.

    The images are large, so that the training process is waiting for its loader when the signal comes.
    """
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(12)])
    large = io.BytesIO()
    Image.new("RGB", (4000, 4000), (200, 30, 90)).save(large, "JPEG")
    for path in data.images.iterdir():
        path.write_bytes(large.getvalue())
    data.preprocess()
    process, log = start(endless(data.corpus, tmp_path, num_workers=2, micro_batch_size=4), tmp_path)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    os.killpg(process.pid, signal.SIGTERM)
    check_stopped(process, log, tmp_path)
    _, alive = psutil.wait_procs(family, PATIENCE_S)
    assert not alive


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


def _fail(error: Exception) -> None:
    raise error


def test_other_ranks_wait_for_rank_0_and_then_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    begin = time.monotonic()
    assert exit_status(lambda: _fail(ConfigError("no such disk")), seconds_for_rank_0=0.2) == 2
    assert time.monotonic() - begin >= 0.2
    assert capsys.readouterr().err == "[rank 3] error: no such disk\n"


def test_unexplained_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: _fail(ZeroDivisionError()))
