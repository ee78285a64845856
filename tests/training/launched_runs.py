"""Runs that are started as a user starts them, ``pretrain_lcl.py`` alone or under ``torchrun``, and looked at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import to_toml
from tests.training.small_runs import small_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pretrain_lcl.py"
PATIENCE_S = 120.0
"""How long a process may take for what takes seconds on an idle machine."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def environment() -> dict[str, str]:
    """Return the environment of a run: one thread, our sources."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@dataclass
class Launched:
    """A run that was started in a folder of its own."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def log(self) -> str:
        """Everything that its processes have said."""
        return (self.folder / "output").read_text()

    @property
    def num_reports(self) -> int:
        metrics = self.folder / "logs" / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    @property
    def ranks(self) -> list[psutil.Process]:
        """Its ranks in order, if torchrun started it."""
        children = psutil.Process(self.process.pid).children()
        return sorted((c for c in children if str(SCRIPT) in c.cmdline()), key=lambda child: child.pid)

    @property
    def saved_steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in (self.folder / "save").glob("step-*"))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait while the run goes on."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log[-4000:]}"
            assert time.monotonic() < end, f"nothing happened:\n{self.log[-4000:]}"
            time.sleep(0.1)

    def wait(self) -> int:
        """Return the exit status."""
        return self.process.wait(PATIENCE_S)


@contextmanager
def launch(
    command: list[str], folder: Path, variables: dict[str, str] | None = None, reports: int = 2
) -> Iterator[Launched]:
    """Start a command in a process group of its own and wait until its run has trained some steps; kill what is left.

    Args:
        command: program and arguments.
        folder: where it starts and where its output goes; the run keeps its logs in ``logs`` there.
        variables: added to its environment.
        reports: how many to wait for.
    """
    with (folder / "output").open("a") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd=folder,
            env=environment() | (variables or {}),
        )
    run = Launched(process, folder)
    try:
        before = run.num_reports
        run.wait_for(lambda: run.num_reports >= before + reports)
        yield run
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for member in family:
            member.kill()
        process.kill()
        process.wait()


def pretrain(config: RunConfig, folder: Path, *launcher: str) -> list[str]:
    """Return the command that trains a configuration."""
    (folder / "run.toml").write_text(to_toml(config))
    return [sys.executable, *launcher, str(SCRIPT), "--config", str(folder / "run.toml")]


def endless(corpus: Path, folder: Path, num_workers: int = 0, micro_batch_size: int = 2) -> RunConfig:
    """Return a run of many more steps than a test can wait for."""
    return small_config(
        corpus,
        data={"num_workers": num_workers},
        training={"train_iters": 1_000_000, "micro_batch_size": micro_batch_size},
        checkpoint={"save": str(folder / "save"), "save_interval": 1_000_000},
        logging={"log_dir": str(folder / "logs")},
    )


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """Wait until processes that may be children of nobody here are dead; a zombie is."""
    end = time.monotonic() + PATIENCE_S
    while alive := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < end, f"still alive: {alive}"
        time.sleep(0.1)


def send_to_group(run: Launched, number: signal.Signals) -> None:
    """Send a signal as Slurm does: to all processes of the job."""
    os.killpg(run.process.pid, number)
