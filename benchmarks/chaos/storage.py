"""Storage that fails while a run saves: full, limited, forbidden, vanished, or a file where the folder should be.

A run of two ranks is disturbed after a random step. Whatever happens, checkpoints that are complete stay whole and
equal those of the undisturbed run, and the run trains on or stops as it was told to. Then the fault is mended, the run
is started again, and must end as if nothing had been.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.batches import by_kind
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.launcher import EventReader, Launch
from benchmarks.chaos.peace import STUCK_S, Undisturbed, undisturbed
from benchmarks.chaos.processes import call_in_child, wait_until_alone, writers
from benchmarks.chaos.small_run import DP2, make_corpus, small_config
from benchmarks.chaos.stored import damaged_checkpoints, newest_step, tensor_digests
from benchmarks.chaos.timeline import differing_rows, rows_of

LANE = "storage"
STEPS, SAVE_INTERVAL = 30, 5
POLICIES = ("continue", "stop")
FREE_BYTES = 500_000
"""Less than half a checkpoint."""
TRIES = 10
LARGE_DISK = 64_000_000
SMALL_FILE = 50_000
"""Bytes; less than the largest file of a checkpoint."""


@dataclass
class Place:
    """Where checkpoints go."""

    save: Path
    """The folder of checkpoints."""
    disk: Path
    """A file system of its own that holds it, where one can be mounted."""
    is_mounted: bool
    """Whether it is one."""

    def remount(self, options: str) -> None:
        """Change the file system."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.disk)], check=True, capture_output=True)


@dataclass(frozen=True)
class Fault:
    """One way for storage to fail."""

    name: str
    """How it is called."""
    begin: Callable[[Place, int], None]
    """Makes it fail; gets the launcher's process id."""
    mend: Callable[[Place], None]
    """Makes it work again, before the run is started again."""
    needs_disk: bool = False
    """Needs a file system of its own, which only root can mount."""
    keeps_old: bool = True
    """Checkpoints written before are still there."""
    may_pass: bool = False
    """Where it comes between two saves, nothing fails."""


def _fill(place: Place, launcher: int) -> None:
    """Leave less free than a checkpoint needs; the file system cannot be made smaller than what it holds."""
    for _ in range(TRIES):
        found = os.statvfs(place.disk)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        with contextlib.suppress(subprocess.CalledProcessError):
            place.remount(f"size={used + FREE_BYTES}")
            return
    raise RuntimeError(f"{place.disk} grew faster than it could be made smaller")


def _empty_disk(place: Place) -> None:
    place.remount(f"size={LARGE_DISK}")


def _forbid(place: Place, launcher: int) -> None:
    """Nothing may be made in the folder; root, whom modes do not stop, sets it immutable."""
    if os.geteuid():
        place.save.chmod(0o500)
    else:
        subprocess.run(["chattr", "+i", str(place.save)], check=True)


def _allow(place: Place) -> None:
    if os.geteuid():
        place.save.chmod(0o700)
    else:
        subprocess.run(["chattr", "-i", str(place.save)], check=True)


def _limit(place: Place, launcher: int) -> None:
    for process in writers(launcher):
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (SMALL_FILE, resource.RLIM_INFINITY))


def _vanish(place: Place, launcher: int) -> None:
    # A file that is being written may appear in a folder while it is deleted.
    while place.save.exists():
        shutil.rmtree(place.save, ignore_errors=True)


def _block(place: Place, launcher: int) -> None:
    """Move the folder away and put a file in its place."""
    place.save.rename(place.save.with_name("moved"))
    place.save.write_bytes(b"")


def _unblock(place: Place) -> None:
    place.save.unlink()
    place.save.with_name("moved").rename(place.save)


def _nothing(place: Place) -> None:
    """Leave it as it is."""


FAULTS = (
    Fault("disk full", _fill, _empty_disk, needs_disk=True),
    Fault("no permission", _forbid, _allow),
    Fault("file size limit", _limit, _nothing),
    Fault("folder vanished", _vanish, _nothing, keeps_old=False, may_pass=True),
    Fault("file instead of folder", _block, _unblock),
)


def run(seed: int, cases: list[int], folder: Path) -> Findings:
    """Let storage fail in every way, with both settings of ``checkpoint.on_save_error``.

    Args:
        seed: of the campaign.
        cases: numbers of the cases.
        folder: scratch.
    """
    findings = Findings(LANE, seed)
    corpus = call_in_child(make_corpus, folder / "data")
    peace = undisturbed(_launch(corpus, folder / "peace", folder / "peace" / "save", "stop"))
    for number in cases:
        fault, policy = FAULTS[number % len(FAULTS)], POLICIES[number // len(FAULTS) % len(POLICIES)]
        with _place(folder / f"case-{number}") as place:
            if fault.needs_disk and not place.is_mounted:
                findings.count("skipped_without_mount")
                continue
            case = _Case(number, fault, policy, place, peace)
            case.go(_launch(corpus, folder / f"case-{number}", place.save, policy), seed)
        findings.cases.append(case.record())
        if case.problems:
            findings.fail(number, f"{fault.name}, {policy}: {'; '.join(case.problems)}\n{case.message}")
    findings.figures |= {
        "cases": len(findings.cases),
        "as_promised": sum(case["outcome"] == "as promised" for case in findings.cases),
        "kinds": by_kind(findings.cases),
    }
    return findings


def _launch(corpus: Path, place: Path, save: Path, policy: str) -> Launch:
    checkpoint = {"save": str(save), "save_interval": SAVE_INTERVAL, "on_save_error": policy}
    config = small_config(corpus, DP2, training={"train_iters": STEPS}, checkpoint=checkpoint)
    return Launch(config, 2, place / "launch", max_restarts=0)


@contextlib.contextmanager
def _place(folder: Path) -> Any:
    """Yield a place for checkpoints, on a file system of its own if this process may mount one."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={LARGE_DISK}", "tmpfs", str(disk)]
    try:
        is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        is_mounted = False
    try:
        yield Place(disk / "save", disk, is_mounted)
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@dataclass
class _Case:
    """One run whose storage fails."""

    number: int
    fault: Fault
    policy: str
    place: Place
    peace: Undisturbed
    message: str = ""

    def __post_init__(self) -> None:
        self.problems: list[str] = []

    def go(self, launch: Launch, seed: int) -> None:
        """Start, disturb, look, mend, start again, compare."""
        step = random.Random(f"{seed}/{LANE}/{self.number}").randint(SAVE_INTERVAL + 2, STEPS - SAVE_INTERVAL - 1)
        events = EventReader(launch.events)
        launcher = launch.start()
        _wait_for_step(events, step)
        before = newest_step(self.place.save)
        self.fault.begin(self.place, launcher)
        self.problems += [f"did not end: {line}" for line in wait_until_alone(STUCK_S)]
        events.read()
        self._look_at_the_end(events.events, launch)
        self.fault.mend(self.place)
        self._look_at_checkpoints(before)
        launch.start()
        self.problems += [f"did not end: {line}" for line in wait_until_alone(STUCK_S)]
        events.read()
        if tensor_digests(self.place.save, STEPS) != tensor_digests(self.peace.save, STEPS):
            self.problems.append("started again, the run did not end as the undisturbed one")
        lost, repeated = differing_rows(self.peace.rows, rows_of(events.events))
        if lost or repeated:
            self.problems.append(f"{lost} rows lost, {repeated} repeated")

    def _look_at_the_end(self, events: list[dict[str, Any]], launch: Launch) -> None:
        """See whether the run went on or stopped as it was told."""
        last = max(event["step"] for event in events if event["what"] == "step")
        status = next(event["status"] for event in events if event["what"] == "end")
        log = launch.log.read_text(encoding="utf-8", errors="replace")
        said = [line for line in log.splitlines() if "could not be written" in line]
        self.message = said[-1] if said else log[-2000:]
        if not said and self.fault.may_pass:
            if status or last != STEPS:
                self.problems.append(f"it ended with status {status} at step {last}")
            return
        if not said:
            self.problems.append("nothing was said about the checkpoint that failed")
        if not launch.canary.exists():
            self.problems.append("the run deleted files in its working directory")
        if "Traceback" in log:
            self.problems.append("there is a traceback")
        if self.policy == "stop" and (status == 0 or last == STEPS):
            self.problems.append(f"it went on to step {last} and ended with status {status}")
        if self.policy == "continue" and last != STEPS:
            self.problems.append(f"it stopped at step {last} with status {status}")
        if self.policy == "continue" and (status == 0) != (newest_step(self.place.save) == STEPS):
            self.problems.append(
                f"it ended with status {status}, its newest checkpoint is {newest_step(self.place.save)}"
            )

    def _look_at_checkpoints(self, before: int) -> None:
        """See whether what was complete is whole, equal, and there."""
        self.problems += damaged_checkpoints(self.place.save)
        newest = newest_step(self.place.save)
        if self.fault.keeps_old and newest < before:
            self.problems.append(f"the newest checkpoint was of step {before} and is of step {newest}")
        if newest and tensor_digests(self.place.save, newest) != tensor_digests(self.peace.save, newest):
            self.problems.append(f"step {newest} differs from the undisturbed run's")

    def record(self) -> dict[str, Any]:
        """Return what came of it."""
        return {
            "case": self.number,
            "kind": f"{self.fault.name}, {self.policy}",
            "outcome": "not as promised" if self.problems else "as promised",
            "message": self.message,
        }


def _wait_for_step(events: EventReader, step: int) -> None:
    end = time.monotonic() + STUCK_S
    while not any(event["what"] == "step" and event["step"] >= step for event in events.events):
        if time.monotonic() > end:
            raise RuntimeError(f"the run did not get to step {step} within {STUCK_S:.0f} s")
        time.sleep(0.002)
        events.read()
