"""The runs of the experiment: what each is told, how many run at a time, which are complete already.

A run lives in a folder of its own with ``job.json`` (what it was told), ``output.txt`` and, once it is complete,
``result.json``. Started again, the experiment skips the complete ones and refuses a folder that holds another run.
Runs are spread over a few processes that live on from run to run, because loading the libraries takes seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from methods import Kind

from lcl_megatron.config import ConfigError

JOB_FILE, RESULT_FILE, OUTPUT_FILE, CPU_FILE = "job.json", "result.json", "output.txt", "cpu_seconds.txt"


class RunFailedError(RuntimeError):
    """A run failed, or its process died; the message says why and where its output is."""


@dataclass(frozen=True)
class Job:
    """One encoder to make and to score."""

    method: str
    """Name of the method."""
    seed: int
    """Seed of weights, order and crops."""
    kind: Kind
    """How the encoder is made."""
    config: str
    """The whole run configuration, as TOML."""
    labels: str
    """``labels.csv``."""
    image_root: str
    """Folder of the images."""
    shards: tuple[str, ...]
    """The documents; the supervised reference trains on the images that they show."""
    test_split: str
    """Split that is scored."""
    images_per_step: int
    """Batch of the supervised reference."""

    @property
    def name(self) -> str:
        """Name of the run and of its folder, e.g. ``lcl-1``."""
        return f"{self.method}-{self.seed}"

    def to_json(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job of ``to_json``."""
        fields = json.loads(text)
        return cls(**fields | {"shards": tuple(fields["shards"])})


@dataclass(frozen=True)
class Finished:
    """A complete run."""

    job: Job
    """What it was told."""
    folder: Path
    """Where it is."""
    result: dict[str, Any]
    """Contents of ``result.json``."""


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    parallel: int,
    run: Callable[[Path], None],
    say: Callable[[str], None] = print,
) -> list[Finished]:
    """Run what is not complete yet, several at a time, and return all, in order.

    Args:
        jobs: the runs.
        folder: folder that holds their folders.
        parallel: processes at a time, one thread each on a CPU.
        run: makes the ``result.json`` of a run's folder; called in another process.
        say: called with a line for every run that is complete.

    Raises:
        ConfigError: a folder holds a run with other settings.
        RunFailedError: a run failed; those that had begun are completed first, so that nothing is lost.
    """
    for job in jobs:
        _claim(job, folder / job.name)
    open_jobs = [job for job in jobs if not (folder / job.name / RESULT_FILE).exists()]
    say(f"{len(jobs)} runs, {len(jobs) - len(open_jobs)} of them complete already")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parallel, spawn, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        pending = {pool.submit(run, folder / job.name): job for job in open_jobs}
        for number, future in enumerate(as_completed(pending), start=1):
            name = pending[future].name
            error = future.exception()
            if error is not None:
                pool.shutdown(cancel_futures=True)
                output = folder / name / OUTPUT_FILE
                raise RunFailedError(f"{name} failed: {error or type(error).__name__}; see {output}") from error
            result = _result(folder / name)
            accuracy, seconds = result["linear"], result["cpu_seconds"]
            say(f"[{number}/{len(open_jobs)}] {name}: linear probe {accuracy:.1%}, {seconds:.0f} CPU seconds")
    return [Finished(job, folder / job.name, _result(folder / job.name)) for job in jobs]


def _end_with(parent: int) -> None:
    """End this process and its children soon after its parent, which may be killed without a chance to say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    return result


def _claim(job: Job, folder: Path) -> None:
    """Write ``job.json``, or check that it says the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOB_FILE
    if not path.exists():
        path.write_text(job.to_json(), encoding="utf-8")
    elif path.read_text(encoding="utf-8") != job.to_json():
        raise ConfigError(
            f"{folder} holds a run with other settings (compare its {JOB_FILE}); choose another --output, or remove it"
        )
