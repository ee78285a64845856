"""Runs under a real launcher that are stopped, lose a rank or lose the launcher.

Oracles: the exit statuses in torchrun's own report; the process table; the run that nothing happened to.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from lcl_megatron.config import RunConfig
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from tests.distributed import run_distributed
from tests.training.launched_runs import (
    PATIENCE_S,
    TORCHRUN,
    Launched,
    endless,
    launch,
    pretrain,
    send_to_group,
    wait_until_gone,
)
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("preemption") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


def check_stopped(run: Launched, status: int) -> dict[str, Any]:
    """The run ended right after the step in which it was asked to, with a checkpoint of it; return its outcome."""
    assert run.wait() == status, run.log[-4000:]
    last = read_reports(run.folder / "logs")[-1]["step"]
    assert run.saved_steps == [last]
    assert (run.folder / "logs" / "curves.html").exists()
    assert not (run.folder / "save" / "stop").exists()
    outcome = json.loads((run.folder / "save" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"], outcome["status"]) == ("stopped", last, 75)
    return outcome


def test_a_signal_to_one_of_two_ranks_stops_both_with_a_checkpoint(corpus: Path, tmp_path: Path) -> None:
    with launch(pretrain(endless(corpus, tmp_path), tmp_path, *TORCHRUN), tmp_path) as run:
        ranks = run.ranks
        assert len(ranks) == 2
        ranks[-1].send_signal(signal.SIGUSR1)
        # What torchrun itself says of a rank that does not end with 0.
        outcome = check_stopped(run, status=1)
    assert outcome["reason"] in ("SIGUSR1", "a signal to another rank")
    assert [line.split()[2] for line in run.log.splitlines() if "exitcode  :" in line] == ["75", "75"]


def test_the_stop_file_ends_a_run_that_torchrun_would_start_again(corpus: Path, tmp_path: Path) -> None:
    command = pretrain(endless(corpus, tmp_path), tmp_path, *TORCHRUN, "--max-restarts", "2")
    (tmp_path / "save").mkdir()
    with launch(command, tmp_path) as run:
        ranks = run.ranks
        (tmp_path / "save" / "stop").touch()
        outcome = check_stopped(run, status=1)
        wait_until_gone(ranks)
    assert outcome["reason"] == "stop file"
    assert "got signal: 15" in run.log
    # The configuration is said once for every time that the ranks are started.
    assert run.log.count("\nstopped by stop file at step") == 1
    assert run.log.count("world size 2: ") == 1


def test_sigterm_to_the_whole_job_while_the_loader_decodes(tmp_path: Path) -> None:
    """The images are large, so that the training process is waiting for its loader when the signal comes."""
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(12)])
    large = io.BytesIO()
    Image.new("RGB", (4000, 4000), (200, 30, 90)).save(large, "JPEG")
    for path in data.images.iterdir():
        path.write_bytes(large.getvalue())
    data.preprocess()
    config = endless(data.corpus, tmp_path, num_workers=2, micro_batch_size=4)
    with launch(pretrain(config, tmp_path), tmp_path) as run:
        family = [psutil.Process(run.process.pid), *psutil.Process(run.process.pid).children(recursive=True)]
        send_to_group(run, signal.SIGTERM)
        assert check_stopped(run, status=75)["reason"] == "SIGTERM"
        assert "Traceback" not in run.log
        _, alive = psutil.wait_procs(family, PATIENCE_S)
        assert not alive


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_ranks_die_with_their_agent(corpus: Path, tmp_path: Path) -> None:
    with launch(pretrain(endless(corpus, tmp_path), tmp_path, *TORCHRUN), tmp_path) as run:
        ranks = run.ranks
        assert len(ranks) == 2
        run.process.kill()
        wait_until_gone(ranks)
    assert run.saved_steps == []


def _train(rank: int, world_size: int, config: RunConfig) -> None:
    with run_from(config) as run:
        train(run)


def _without_clocks(reports: list[dict[str, float]]) -> list[dict[str, float]]:
    clocks = ("perf/", "time")
    return [{name: value for name, value in report.items() if not name.startswith(clocks)} for report in reports]


@pytest.mark.slow
def test_a_run_that_loses_a_rank_goes_on_and_ends_like_one_that_lost_none(corpus: Path, tmp_path: Path) -> None:
    def config(name: str) -> RunConfig:
        folder = tmp_path / name
        folder.mkdir()
        return small_config(
            corpus,
            training={"train_iters": 24, "micro_batch_size": 2},
            checkpoint={"save": str(folder / "save"), "save_interval": 8, "async_save": False},
            logging={"log_dir": str(folder / "logs")},
        )

    with launch(
        pretrain(config("lost"), tmp_path / "lost", *TORCHRUN, "--max-restarts", "2"), tmp_path / "lost", reports=10
    ) as run:
        killed = run.ranks[1]
        killed.kill()
        assert run.wait() == 0, run.log[-4000:]
    assert f"(exitcode: -9) local_rank: 1 (pid: {killed.pid})" in run.log
    assert f"continuing from {tmp_path / 'lost' / 'save' / 'step-000000'}" in run.log
    run_distributed(_train, 2, config("whole"))
    lost, whole = (_without_clocks(read_reports(tmp_path / name / "logs")) for name in ("lost", "whole"))
    assert [report["step"] for report in whole] == list(range(1, 25))
    assert lost == whole
