"""A launcher that behaves as ``torchrun --max-restarts``, with ranks that are forked instead of started anew.

When a rank dies, the launcher asks the others to end (SIGTERM), kills those that have not after torchrun's 30 seconds,
and starts all ranks again. Launcher and ranks append what happens to one file of events, which is how the campaign
knows whom to kill and when a step was completed; nothing of that is in the code under test.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos.processes import fork, join_ranks, redirect_output
from lcl_megatron.config import RunConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.training.ending import ExitStatus
from lcl_megatron.training.failure import exit_status
from lcl_megatron.training.loop import train
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.stop import StopSignal

TORCHRUN_GRACE_S = 30.0
"""What torchrun gives workers between SIGTERM and SIGKILL."""


class WatchedLoader:
    """The run's own loader; notes which rows are read, and, asked for the next step, that the one before is complete.

    Args:
        loader: what the run reads.
        events: file to append to.
        rank: this rank.
    """

    def __init__(self, loader: Iterable[StepBatch], events: Path, rank: int) -> None:
        self._loader = loader
        self._events = events
        self._rank = rank

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the loader's steps."""
        for batch in self._loader:
            # Before the step: what a checkpoint holds must be known even if the rank dies right behind it.
            note(self._events, "read", rank=self._rank, step=batch.step + 1, rows=row_digests(batch))
            yield batch
            note(self._events, "step", rank=self._rank, step=batch.step + 1)


def row_digests(batch: StepBatch) -> list[str]:
    """Return a hash of each row of a step on this rank: its tokens, its documents' borders, its cropped images."""
    digests = []
    for micro_batch in batch.micro_batches:
        row_of_image = (micro_batch.image_slots // micro_batch.tokens.shape[1]).tolist()
        for row in range(micro_batch.tokens.shape[0]):
            digest = hashlib.blake2b(digest_size=8)
            digest.update(micro_batch.tokens[row].numpy().tobytes())
            digest.update(micro_batch.position_ids[row].numpy().tobytes())
            if micro_batch.images is not None:
                shown = [image for image, owner in enumerate(row_of_image) if owner == row]
                digest.update(micro_batch.images[shown].numpy().tobytes())
            digests.append(digest.hexdigest())
    return digests


def note(events: Path, what: str, **facts: Any) -> None:
    """Append an event; one write, so that lines of several processes do not mix."""
    line = json.dumps({"what": what, "time": time.monotonic(), "process": os.getpid(), **facts}) + "\n"
    descriptor = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode("ascii"))
    os.close(descriptor)


@dataclass
class EventReader:
    """Follows a file of events."""

    path: Path
    """The file."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """All that has been read."""
    _position: int = 0

    def read(self) -> list[dict[str, Any]]:
        """Return what is new; a line that is not finished is left for later."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as stream:
            stream.seek(self._position)
            complete = stream.read().rpartition(b"\n")[0]
        if not complete:
            return []
        self._position += len(complete) + 1
        new = [json.loads(line) for line in complete.splitlines()]
        self.events += new
        return new


@dataclass(frozen=True)
class Launch:
    """A run under a launcher."""

    config: RunConfig
    """What is trained."""
    world_size: int
    """Ranks."""
    folder: Path
    """Holds the events, the ranks' output and their meeting points."""
    max_restarts: int = 1000
    """As torchrun's flag."""
    on_ready: Callable[[int, Run], None] | None = None
    """Called on every rank with its number and its run, before the first step: where faults come from inside."""

    @property
    def events(self) -> Path:
        """File of events."""
        return self.folder / "events.jsonl"

    @property
    def log(self) -> Path:
        """What ranks print."""
        return self.folder / "log.txt"

    @property
    def canary(self) -> Path:
        """A file in the ranks' working directory, which is none of their business."""
        return self.folder / "cwd" / "canary"

    def start(self) -> int:
        """Fork the launcher; return its process id."""
        self.canary.parent.mkdir(parents=True, exist_ok=True)
        self.canary.touch()
        return fork(self._launcher)

    def _launcher(self) -> int:
        redirect_output(self.log)
        os.chdir(self.canary.parent)
        for attempt in range(self.max_restarts + 1):
            store = self.folder / f"store-{os.getpid()}-{attempt}"
            ranks = {fork(functools.partial(self._rank, rank, store)): rank for rank in range(self.world_size)}
            note(self.events, "start", ranks={rank: process for process, rank in ranks.items()})
            status = self._watch(ranks)
            store.unlink(missing_ok=True)
            note(self.events, "end", status=status)
            if status == 0:
                return 0
        return 1

    def _watch(self, ranks: dict[int, int]) -> int:
        """Wait for all ranks; return 0 or the first status that is not, when no rank is left."""
        first, deadline = 0, float("inf")
        while ranks:
            process, status = os.waitpid(-1, 0 if first == 0 else os.WNOHANG)
            if process:
                rank, code = ranks.pop(process), os.waitstatus_to_exitcode(status)
                note(self.events, "death", rank=rank, victim=process, status=code)
                if code and not first:
                    first, deadline = code, time.monotonic() + TORCHRUN_GRACE_S
                    _signal(ranks, signal.SIGTERM)
                continue
            if time.monotonic() > deadline:
                note(self.events, "grace is over", ranks=list(ranks.values()))
                _signal(ranks, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.002)
        return first

    def _rank(self, rank: int, store: Path) -> int:
        join_ranks(rank, self.world_size, store, 60 * self.config.parallel.distributed_timeout_minutes)
        # From here on as pretrain_lcl.py.
        with StopSignal() as stop:
            return exit_status(lambda: self._train(rank, stop), seconds_for_rank_0=0.0)

    def _train(self, rank: int, stop: StopSignal) -> ExitStatus:
        with run_from(self.config, stop) as run:
            note(self.events, "ready", rank=rank, step=run.progress.step)
            if self.on_ready is not None:
                self.on_ready(rank, run)
            run.loader = WatchedLoader(run.loader, self.events, rank)
            return train(run).status


def _signal(processes: dict[int, int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
