"""The batch script of ``examples/slurm``, run by bash with stand-ins for Slurm's own commands.

Oracles: what it asks of ``scontrol``; exit statuses; the checkpoints of the run, which is a real one under torchrun.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lcl_megatron.config.toml import to_toml
from tests.training.launched_runs import PATIENCE_S, ROOT, environment, launch
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config

BATCH = ROOT / "examples" / "slurm" / "pretrain.sbatch"
SCONTROL = 'case $1 in show) echo localhost ;; requeue) echo "$2" >> requeued ;; esac\n'
TORCHRUN = f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n'


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _slurm(folder: Path, torchrun: str = TORCHRUN) -> dict[str, str]:
    """Write the commands that the script calls; return what Slurm would set."""
    commands = folder / "bin"
    commands.mkdir()
    for name, body in (("srun", 'exec "$@"\n'), ("scontrol", SCONTROL), ("torchrun", torchrun)):
        path = commands / name
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node[1-1]",
        "NPROC_PER_NODE": "1",
        "OMP_NUM_THREADS": "1",
        "RDZV_PORT": str(_free_port()),
    }


def _requeued(folder: Path) -> list[str]:
    path = folder / "requeued"
    return path.read_text().split() if path.exists() else []


@pytest.mark.slow
def test_job_whose_time_is_up_goes_back_into_the_queue_until_the_run_is_finished(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    config = small_config(
        data.corpus,
        training={"train_iters": 400},
        checkpoint={"save_interval": 1000},
        logging={"log_dir": str(tmp_path / "logs")},
    )
    (tmp_path / "run.toml").write_text(to_toml(config))
    (tmp_path / "pretrain_lcl.py").symlink_to(ROOT / "pretrain_lcl.py")
    variables = _slurm(tmp_path)
    command = ["bash", str(BATCH), "save", "--config", "run.toml"]

    with launch(command, tmp_path, variables) as job:
        job.process.send_signal(signal.SIGUSR1)
        assert job.wait() == 0, job.log[-4000:]
    assert _requeued(tmp_path) == ["4711"]
    (stopped,) = job.saved_steps
    assert stopped < 400
    assert "job 4711 goes back into the queue" in job.log
    assert not (tmp_path / "save" / "stop").exists()

    with launch(command, tmp_path, variables) as job:
        assert job.wait() == 0, job.log[-4000:]
    assert _requeued(tmp_path) == ["4711"]
    assert job.saved_steps == [stopped, 400]
    assert f"continuing from save/step-{stopped:08d}" in job.log
    assert job.log.endswith("the run is finished\n")
    assert [report["step"] for report in read_reports(tmp_path / "logs")] == list(range(1, 401))


OUTCOME = """'{"outcome": "OUTCOME", "step": 3}' > save/outcome.json\n"""


@pytest.mark.parametrize(
    ("torchrun", "status", "said"),
    [
        ("exit 3\n", 3, "the run has failed (torchrun: status 3), and the job stays out of the queue"),
        ("exit 0\n", 1, "the run has failed (torchrun: status 0), and the job stays out of the queue"),
        (f"echo {OUTCOME.replace('OUTCOME', 'stopped')}exit 1\n", 75, "the run is not finished: start it again"),
        (f"echo {OUTCOME.replace('OUTCOME', 'finished')}exit 0\n", 0, "the run is finished"),
    ],
)
def test_job_that_ends_by_itself_is_not_started_again(torchrun: str, status: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "save").mkdir()
    # What an earlier job has left does not count.
    (tmp_path / "save" / "outcome.json").write_text('{"outcome": "finished"}\n')
    job = subprocess.run(
        ["bash", str(BATCH), "save", "--preset", "tiny"],
        cwd=tmp_path,
        env=environment() | _slurm(tmp_path, torchrun),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert job.returncode == status, job.stderr
    assert said in job.stdout
    assert _requeued(tmp_path) == []


def test_job_passes_on_what_it_was_given(tmp_path: Path) -> None:
    subprocess.run(
        ["bash", str(BATCH), "a folder", "--preset", "tiny", "--data-path", "one", "two"],
        cwd=tmp_path,
        env=environment() | _slurm(tmp_path, 'printf "%s\\n" "$@" > arguments\n') | {"MAX_RESTARTS": "7"},
        capture_output=True,
        timeout=PATIENCE_S,
    )
    arguments = (tmp_path / "arguments").read_text().splitlines()
    where = arguments.index("pretrain_lcl.py")
    launcher = dict(zip(arguments[:where:2], arguments[1:where:2], strict=True))
    assert launcher["--max-restarts"] == "7"
    assert launcher["--rdzv-id"] == "4711"
    assert launcher["--rdzv-endpoint"].startswith("localhost:")
    assert arguments[where + 1 :] == ["--save", "a folder", "--preset", "tiny", "--data-path", "one", "two"]


def test_job_without_a_folder_says_what_it_needs(tmp_path: Path) -> None:
    job = subprocess.run(["bash", str(BATCH)], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert job.returncode != 0
    assert "usage: sbatch examples/slurm/pretrain.sbatch SAVE" in job.stderr
