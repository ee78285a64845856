"""One run that is killed again and again, at random moments, until it has ended by itself."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.chaos.launcher import EventReader, Launch
from benchmarks.chaos.peace import STUCK_S, Undisturbed
from benchmarks.chaos.processes import descendants, wait_until_alone, writers
from benchmarks.chaos.stored import damaged_checkpoints, newest_step, tensor_digests
from benchmarks.chaos.timeline import differing_rows, recovery, rows_of
from lcl_megatron.training.ending import ExitStatus

TARGETS = ("rank", "all ranks", "launcher", "writer")
WEIGHTS = (4, 2, 2, 2)
SHARE_AT_SAVES = 0.4
"""Kills that wait for a save to begin; the others come at any moment of a cycle."""
LONGEST_PAUSE_S = 0.15
"""Time after the begin of a save in which a kill comes that waited for it."""
CYCLE_STEPS = 15
"""A kill comes while a start and so many steps would last."""


@dataclass(frozen=True)
class Aim:
    """Whom to kill, and when."""

    target: str
    """One of ``TARGETS``."""
    at_save: bool
    """Wait until a save has begun."""
    delay_s: float
    """Seconds after the start of the ranks, or after the last kill if that left them alive."""
    pause_s: float
    """Seconds after the begin of the save."""
    choice: float
    """Which one of several, from 0 to 1."""


@dataclass
class KilledRun:
    """One run under fire."""

    launch: Launch
    """How it is started."""
    save: Path
    """Its checkpoints."""
    peace: Undisturbed
    """What it must equal."""
    random: random.Random
    """Chooses everything."""
    kills: list[dict[str, Any]] = field(default_factory=list)
    """What was done to it."""
    problems: list[str] = field(default_factory=list)
    """What must not be."""

    def __post_init__(self) -> None:
        self._events = EventReader(self.launch.events)
        self._since = 0.0
        self._newest = -1
        self._compared = 0

    def go(self, most: int) -> None:
        """Start it and kill until ``most`` kills are done or it has ended by itself; then let it end."""
        self._launcher = self.launch.start()
        while len(self.kills) < most and not self.problems:
            aim = self._aim()
            if not self._wait_for(aim):
                break
            self._kill(aim)
            self._check_storage()
        end = time.monotonic() + STUCK_S
        while not self._has_ended():
            if time.monotonic() > end:
                self.problems.append(f"it did not end within {STUCK_S:.0f} s after the last kill")
                os.kill(self._launcher, signal.SIGKILL)
            time.sleep(0.005)
        self._events.read()
        self.problems += [f"left behind: {line}" for line in wait_until_alone()]

    def _aim(self) -> Aim:
        rng = self.random
        return Aim(
            rng.choices(TARGETS, WEIGHTS)[0],
            rng.random() < SHARE_AT_SAVES,
            rng.uniform(0, self.peace.start_s + CYCLE_STEPS * self.peace.step_s),
            rng.uniform(0, LONGEST_PAUSE_S),
            rng.random(),
        )

    def _wait_for(self, aim: Aim) -> bool:
        """Wait for the moment; returns False if the run has ended before."""
        stuck = time.monotonic() + STUCK_S
        while time.monotonic() < stuck:
            if self._has_ended():
                return False
            for event in self._events.read():
                if event["what"] == "start":
                    self._since = event["time"]
            if self._since == 0 or not self._ranks():
                pass
            elif aim.at_save or aim.target == "writer":
                if self.is_saving() and (aim.target != "writer" or writers(self._launcher)):
                    time.sleep(aim.pause_s)
                    return True
            elif time.monotonic() > self._since + aim.delay_s:
                return True
            time.sleep(0.002)
        self.problems.append(f"nothing to kill ({aim.target}) within {STUCK_S:.0f} s")
        return False

    def _kill(self, aim: Aim) -> None:
        """Kill, note it, and see to it that the run can go on."""
        victims = self._victims(aim)
        phase = self._phase()
        killed = 0
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                killed += 1
        if not killed:
            return
        now = time.monotonic()
        self.kills.append({"target": aim.target, "phase": phase, "time": now})
        if aim.target == "launcher":
            os.waitpid(self._launcher, 0)
            left = wait_until_alone()
            self.kills[-1]["alone_after_s"] = time.monotonic() - now
            self.problems += [f"survived its launcher: {line}" for line in left]
            self._launcher = self.launch.start()
        if aim.target == "writer":
            self._since = now
        else:
            self._since = 0.0

    def _victims(self, aim: Aim) -> list[int]:
        if aim.target == "launcher":
            return [self._launcher]
        if aim.target == "writer":
            found = writers(self._launcher)
            return [found[int(aim.choice * len(found))]] if found else []
        alive = {process.pid for process in descendants(self._launcher)}
        ranks = [process for process in self._ranks() if process in alive]
        return ranks if aim.target == "all ranks" or not ranks else [ranks[int(aim.choice * len(ranks))]]

    def _ranks(self) -> list[int]:
        """Return the process ids of the ranks that were started last, unless one of them has ended."""
        last = next((event for event in reversed(self._events.events) if event["what"] in ("start", "death")), None)
        return list(last["ranks"].values()) if last is not None and last["what"] == "start" else []

    def is_saving(self) -> bool:
        """Return whether a checkpoint is being written (or was, when its writers died)."""
        with contextlib.suppress(FileNotFoundError):
            return any(name.startswith(".staging-") for name in os.listdir(self.save))
        return False

    def _phase(self) -> str:
        ready = {event["rank"] for event in self._events.events if event["what"] == "ready" and self._is_new(event)}
        if len(ready) < self.launch.world_size:
            return "start"
        if not self.is_saving():
            return "step"
        return "commit" if any(self.save.glob(".staging-*/index.json")) else "save"

    def _is_new(self, event: dict[str, Any]) -> bool:
        return event["process"] in self._ranks()

    def _has_ended(self) -> bool:
        """Return whether the launcher has ended; a launcher that gave up is a problem."""
        with contextlib.suppress(ChildProcessError):
            process, status = os.waitpid(self._launcher, os.WNOHANG)
            if process == 0:
                return False
            if status:
                self.problems.append(f"the launcher ended with status {status}")
        return True

    def _check_storage(self) -> None:
        """What has a name is whole; the newest never gets older, and equals the undisturbed run's of that step."""
        newest = newest_step(self.save)
        if newest < self._newest:
            self.problems.append(f"the newest checkpoint went back from step {self._newest} to {newest}")
        self._newest = newest
        self.problems += [f"torn after a kill: {name}" for name in damaged_checkpoints(self.save)]
        self._compared += newest > 0
        if newest and tensor_digests(self.save, newest) != tensor_digests(self.peace.save, newest):
            self.problems.append(f"after a kill, step {newest} differs from the undisturbed run's")

    def verdict(self) -> dict[str, Any]:
        """Compare with the undisturbed run; return the figures of this case."""
        trained = rows_of(self._events.events)
        lost, repeated = differing_rows(self.peace.rows, trained)
        step = self.launch.config.training.train_iters
        equal = tensor_digests(self.save, step) == tensor_digests(self.peace.save, step)
        by_itself = self._deaths_without_a_kill()
        self.problems += [f"rank {rank} ended with status {status}, unkilled" for rank, status in by_itself]
        for kill in self.kills:
            kill["recovery_s"] = recovery(kill, self._events.events)
        grace = sum(event["what"] == "grace is over" for event in self._events.events)
        return {
            "lost": lost,
            "repeated": repeated,
            "equal": equal,
            "kills": self.kills,
            "waited_30_s": grace,
            "compared": self._compared,
        }

    def _deaths_without_a_kill(self) -> Iterator[tuple[int, int]]:
        """Yield (rank, status) of the first death of every start of the ranks that no kill explains.

        A writer's death ends nobody, unless it was busy with the last checkpoint: a run whose last checkpoint failed
        ends with the status for that, and is started again.
        """
        begin, first = 0.0, True
        for event in self._events.events:
            if event["what"] == "start":
                begin, first = event["time"], True
            elif event["what"] == "death" and event["status"] and first:
                first = False
                may_be_writer = event["status"] == ExitStatus.CHECKPOINT
                if not any(
                    begin <= kill["time"] <= event["time"] and (kill["target"] != "writer" or may_be_writer)
                    for kill in self.kills
                ):
                    yield event["rank"], event["status"]
