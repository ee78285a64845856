"""Noticing that a run hangs, saying where and because of whom, and ending what nothing else would end.

A collective waits for the slowest rank; if one stops, all stand still without a word. Each rank therefore has a thread
that looks whether its loop gets on, and tells the others through ``parallel.heartbeats``. Three things follow:

- after ``guard.hang_minutes`` in one phase, a rank writes its stacks, and who is behind;
- an error out of a collective is raised again as ``CollectiveError``, with the rank, step and phase, and who is behind;
- past ``parallel.distributed_timeout_minutes``, when every collective has given up, a process that still stands (a
  dead file system, say) ends itself, so that the launcher starts the run anew.

All times are of monotonic clocks. Time in which the thread itself was not run (a stopped process, a machine that was
suspended) is not counted, except by the second line, ``faulthandler``: it may end a process that goes on after it was
stopped for longer than the limit.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lcl_megatron.parallel.collective_errors import is_collective_error
from lcl_megatron.parallel.heartbeats import BoardError, Heartbeats
from lcl_megatron.training.suspects import Phase, Reading, name_suspects

if TYPE_CHECKING:
    from lcl_megatron.config import RunConfig
    from lcl_megatron.parallel.groups import ProcessGroups

HANGS_FOLDER = "hangs"
"""Folder below ``logging.log_dir``, or below ``checkpoint.save``, with one file for each rank that hung."""
_MAX_INTERVAL_S = 1.0
_BEATS_TO_TELL = 2.5
"""A living rank writes at least once in so many intervals."""
_STANDARD_ERROR = 2
_DISK_PHASES = ("load", "save")


class CollectiveError(RuntimeError):
    """A collective failed, because a rank is late or gone; the message says which."""


@dataclass(frozen=True)
class HangLimits:
    """When a rank that stands still speaks, and when it ends; seconds."""

    report_s: float
    """Stacks are written; 0 = nothing is watched."""
    exit_s: float
    """The process ends."""
    exit_disk_s: float
    """The process ends in the phases ``load`` and ``save``, which may take longer than any collective."""

    @classmethod
    def of(cls, config: RunConfig) -> HangLimits:
        """Return the limits of a run; a process ends a tenth, at most a minute, after a collective would have."""
        collective = 60 * config.parallel.distributed_timeout_minutes
        exit_s = collective + min(60.0, 0.1 * collective)
        return cls(60 * config.guard.hang_minutes, exit_s, exit_s + 60 * config.checkpoint.save_timeout_minutes)

    def exit_in(self, phase: Phase) -> float:
        """Return after how long in a phase the process ends."""
        return self.exit_disk_s if phase in _DISK_PHASES else self.exit_s


class _Place(NamedTuple):
    """Where the loop is. Each mark makes a new one, so that the same step and phase again count as progress."""

    step: int
    phase: Phase
    since: float


class Watchdog:
    """Watches the loop of one rank.

    The loop calls ``mark``, which sets an attribute. All else is done by a daemon thread, which runs while the main
    thread waits in a collective, for that releases the interpreter's lock. For code that does not, ``faulthandler``'s
    own thread, which needs no lock, writes the stacks and ends the process when this thread stops putting it off.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        limits: HangLimits,
        folder: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a watchdog that sleeps.

        Args:
            groups: process groups.
            limits: when it speaks and ends.
            folder: where the stacks are written; None = to standard error.
            clock: seconds on a clock that never runs backwards.
        """
        self._groups = groups
        self._limits = limits
        self._file = None if folder is None else folder / f"rank-{groups.rank:05d}.txt"
        self._clock = clock
        self._place = _Place(0, "start", clock())
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._board: Heartbeats | None = None
        self._passes: Callable[[], int] = lambda: 0
        """Forward passes that have begun: a step of many micro-batches gets on within one phase."""
        self._seen, self._looked_at = (self._place, 0), self._place.since
        """Where the loop was when the thread last looked, and when that was."""
        self._still_s = 0.0
        """How long the loop has been there, without time in which the thread was not run."""
        self._reading: Reading | None = None
        """The board in the middle of a hang: whoever has not written since is silent."""
        self._has_spoken = False
        """Whether this hang has been reported."""

    def mark(self, phase: Phase, step: int | None = None) -> None:
        """Say what the loop does from now on.

        Args:
            phase: part of the step.
            step: optimizer step, 1 for the first; None = as before.
        """
        before = self._place
        self._place = _Place(before.step if step is None else step, phase, self._clock())
        if before.phase in _DISK_PHASES and self._thread is not None:
            # The thread, which may not come to run again, has allowed for the time of a disk.
            self._put_off_end(self._limits.exit_in(phase))

    def follow(self, passes: Callable[[], int]) -> None:
        """Take the number of forward passes, which goes up within a step, for a sign of progress too."""
        self._passes = passes

    def start(self) -> None:
        """Begin to watch, unless ``report_s`` is 0; collective over all ranks, on the host."""
        if self._limits.report_s == 0:
            return
        self._board = Heartbeats.open(self._groups, min(_MAX_INTERVAL_S, self._limits.report_s / 4))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching, and tell the others that this rank left; calling it again is harmless."""
        if self._place.phase != "failed":
            self.mark("end")
        if self._thread is None:
            return
        self._closed.set()
        # It may be stuck in a store that is gone; as a daemon it does not keep the process.
        self._thread.join(timeout=10.0)
        self._thread = None
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Explain errors out of collectives that are raised inside; leave all others alone.

        Raises:
            CollectiveError: in the place of an error out of a collective, from which it is raised.
        """
        try:
            yield
        except CollectiveError:
            raise
        except RuntimeError as error:
            if not is_collective_error(error):
                raise
            raise CollectiveError(self._explain(error)) from error

    def _explain(self, error: BaseException) -> str:
        """Return what is known of a failed collective: this rank's place, the error, and who is behind.

        What this rank knows by itself goes to standard error at once, because a launcher may end the process before
        the others' silence is certain, which takes some beats.
        """
        place = self._place
        self.mark("failed")
        own = f"{self._groups.describe()}: step {place.step}, {place.phase}: a collective failed: {error}"
        if self._board is None:
            return f"{own}\n  who is behind is not known: guard.hang_minutes = 0 watches nothing"
        _say(own)
        try:
            first = self._read(self._board)
            time.sleep(_BEATS_TO_TELL * self._board.interval)
            suspects = name_suspects(first, self._read(self._board), self._groups.describe)
        except BoardError as gone:
            suspects = [f"who is behind is not known: {gone}"]
        return "\n  ".join([own, *suspects])

    def _read(self, board: Heartbeats) -> Reading:
        return Reading(self._clock(), board.read())

    def _watch(self) -> None:
        """Body of the thread."""
        assert self._board is not None
        while True:
            self._look(self._board)
            if self._closed.wait(self._board.interval):
                break
        self._look(self._board)

    def _look(self, board: Heartbeats) -> None:
        """Look once whether the loop got on."""
        place, now = self._place, self._clock()
        # No more than the thread slept: a process that was stopped for an hour did not hang for an hour.
        passed, self._looked_at = min(now - self._looked_at, 3 * board.interval), now
        seen = place, self._passes()
        if seen[0] is not self._seen[0] or seen[1] != self._seen[1]:
            if self._has_spoken and place.phase != "failed":
                self._write(f"{self._groups.describe()} goes on again, after {self._still_s:.0f} s", stacks=False)
            self._seen, self._still_s, self._reading, self._has_spoken = seen, 0.0, None, False
        else:
            self._still_s += passed
        left = self._limits.exit_in(place.phase) - self._still_s
        if left > 0:
            self._put_off_end(left)
        is_alive = self._beat(board)
        if self._still_s >= self._limits.report_s / 2 and self._reading is None and is_alive:
            self._reading = self._read_or_none(board)
        if (self._still_s >= self._limits.report_s and self._can_tell(board, is_alive)) or left <= 0:
            self._report(board, place)
        if left <= 0:
            self._end(place)

    def _put_off_end(self, seconds: float) -> None:
        """Let the thread of ``faulthandler`` end the process a while after this one would have."""
        if self._closed.is_set():  # what comes after the run is not watched
            return
        interval = 0.0 if self._board is None else self._board.interval
        faulthandler.dump_traceback_later(seconds + 3 * interval + 1, exit=True, file=_STANDARD_ERROR)

    def _beat(self, board: Heartbeats) -> bool:
        """Tell the others; return whether the store still answers. Without it, a rank watches itself alone."""
        place = self._place
        try:
            board.write(place.step, place.phase, self._clock() - place.since)
        except BoardError:
            return False
        return True

    def _read_or_none(self, board: Heartbeats) -> Reading | None:
        try:
            return self._read(board)
        except BoardError:
            return None

    def _can_tell(self, board: Heartbeats, is_alive: bool) -> bool:
        """Whether the first reading is old enough that a living rank has written since."""
        if not is_alive or self._still_s >= 2 * self._limits.report_s:
            return True
        return self._reading is not None and self._clock() - self._reading.at >= _BEATS_TO_TELL * board.interval

    def _report(self, board: Heartbeats, place: _Place) -> None:
        """Write once per hang where this rank stands, who is behind, and all stacks."""
        if self._has_spoken:
            return
        self._has_spoken = True
        me = self._groups.describe()
        text = f"{me} hangs: step {place.step}, {place.phase}, for {self._still_s:.0f} s"
        lines: list[str] = []
        if self._groups.world_size > 1:
            now = self._read_or_none(board)
            if self._reading is None or now is None:
                lines = ["who is behind is not known: the store of torch.distributed does not answer"]
            else:
                lines = name_suspects(self._reading, now, self._groups.describe)
        # Of thousands of ranks only those that are behind show their stacks in the log of all; files hold the others'.
        is_suspect = not lines or any(line.startswith(f"{me} ") for line in lines)
        self._write("\n  ".join([text, *lines]), stacks=True, stacks_in_log=is_suspect)

    def _write(self, text: str, *, stacks: bool, stacks_in_log: bool = False) -> None:
        """Write to standard error, and to this rank's file; the file last, for its disk may be what hangs."""
        dump = _stacks() if stacks else ""
        if dump and self._file is not None and not stacks_in_log:
            _say(f"{text}\n  stacks: {self._file}")
        else:
            _say(f"{text}\n{dump}".rstrip())
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n{dump}\n")
        except OSError as error:
            _say(f"{self._groups.describe()}: {self._file} cannot be written: {error}\n{dump}")

    def _end(self, place: _Place) -> None:
        """End a process that no collective ends."""
        _say(
            f"{self._groups.describe()} ends: it stood in step {place.step}, {place.phase}, for {self._still_s:.0f} s, "
            "longer than any collective may take (parallel.distributed_timeout_minutes)"
        )
        os._exit(1)


@contextmanager
def watch(config: RunConfig, groups: ProcessGroups) -> Iterator[Watchdog]:
    """Watch over a run, and explain its errors; collective over all ranks.

    Raises:
        CollectiveError: see ``Watchdog.explained``.
    """
    root = config.logging.log_dir or config.checkpoint.save
    watchdog = Watchdog(groups, HangLimits.of(config), Path(root) / HANGS_FOLDER if root else None)
    watchdog.start()
    try:
        with watchdog.explained():
            yield watchdog
    finally:
        watchdog.close()


def _stacks() -> str:
    """Return the stacks of all threads."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _say(text: str) -> None:
    """Write a message in one piece, so that those of several ranks do not mix."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
