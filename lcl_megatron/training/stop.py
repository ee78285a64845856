"""Stopping between two steps when somebody asks for it: SIGTERM, SIGUSR1, or a file called ``stop``.

Python runs a handler only between two instructions of the main thread, which may be waiting for another rank inside
torch. What has to happen at once therefore happens in a thread of its own, which the interpreter wakes.
It needs nothing but the standard library, so that a process can listen before it imports anything slow.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import FrameType, TracebackType

from lcl_megatron.training import launcher
from lcl_megatron.training.ending import OUTCOME_FILE, ExitStatus

logger = logging.getLogger(__name__)

STOP_FILE = "stop"
"""File of a ``checkpoint.save`` folder that asks the run to stop."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop."""
SECONDS_OF_ONE_REQUEST = 2.0
"""A signal that comes again within this time is the same request: both Slurm and torchrun deliver it to every rank."""
SECONDS_BETWEEN_LOOKS = 1.0
"""How often a run looks for the stop file, at most: folders of checkpoints lie on network file systems."""

_CLOSED = 0
"""Byte that ends the thread; no signal has this number."""

_Handler = Callable[[int, FrameType | None], object] | int | None


class _Phase(Enum):
    STARTING = "nothing is trained yet"
    TRAINING = "steps to finish and to save"
    LEAVING = "everything is saved"


class StopSignal:
    """Remembers that the run was asked to stop; the loop then saves and ends after the step in progress.

    All ranks must stop after the same step, so a rank's request travels with the step's agreement. What a signal does:

    * before training begins: the process leaves at once with status 75, for there is nothing to save;
    * while it trains: the run saves after the step in progress and leaves. The same signal again, more than 2 seconds
      later, makes the process leave at once with 128 + its number, even in the middle of a save. SIGTERM after SIGUSR1
      does not: Slurm sends both to a job whose time is up, and a save may still fit in between;
    * when all is saved: nothing, for 2 seconds, because an agent sends SIGTERM to all ranks as soon as one has left;
      after that the process leaves at once.
    """

    def __init__(self) -> None:
        self.reason = ""
        """What asked this rank to stop: ``SIGTERM``, ``SIGUSR1``, ``stop file``; empty = nothing has."""
        self._phase = _Phase.STARTING
        self._status = ExitStatus.STOPPED
        self._first: dict[int, float] = {}
        self._leaving_since = 0.0
        self._stop_file: Path | None = None
        self._next_look = 0.0
        self._previous: dict[int, _Handler] = {}
        self._previous_fd = -1
        self._writer = -1
        self._thread: threading.Thread | None = None

    def listen(self) -> None:
        """Take over SIGTERM and SIGUSR1; only possible in the main thread of a process. Again: nothing."""
        if self._thread is not None:
            return
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._wait, args=(reader,), name="stop", daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        _shield_forked_children()
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def watch_stop_file(self, save: str) -> None:
        """Look for ``SAVE/stop`` from now on; to be called on rank 0 alone, as soon as it may write to the folder.

        What an earlier run has left there is removed: its outcome, and a request that came too late for it, which would
        stop this run at its first step. Ranks that torchrun has started again belong to the job that was asked.

        Args:
            save: ``checkpoint.save``; empty = there is no such file.
        """
        if not save:
            return
        self._stop_file = Path(save) / STOP_FILE
        (Path(save) / OUTCOME_FILE).unlink(missing_ok=True)
        if launcher.restart_count() == 0 and self._stop_file.exists():
            self._stop_file.unlink(missing_ok=True)
            logger.warning("%s was there before this run began: removed, and not obeyed", self._stop_file)

    def begin(self) -> None:
        """Training begins: from now on a request is remembered, and obeyed at the end of a step."""
        self._phase = _Phase.TRAINING

    @property
    def requested(self) -> bool:
        """Whether this rank was asked to stop; looks for the stop file, at most once a second."""
        if not self.reason and self._stop_file is not None and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
            if self._stop_file.exists():
                self.reason = "stop file"
        return bool(self.reason)

    @property
    def received(self) -> tuple[signal.Signals, ...]:
        """Signals that have come to this process."""
        return tuple(signal.Signals(number) for number in self._first)

    def leave(self, status: ExitStatus) -> None:
        """Everything is saved: a request no longer changes anything.

        Args:
            status: exit status of a process that has to leave before it has tidied up.
        """
        self._status = status
        self._leaving_since = time.monotonic()
        self._phase = _Phase.LEAVING

    def forget_stop_file(self) -> None:
        """Remove the stop file, which has been obeyed: it would stop the next run too."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back: a process that no longer trains ends at once when asked to.

        Unless it is on its way out under ``torchrun``, whose SIGTERM to the last ranks would hide their exit status.
        """
        if self._thread is None:
            return
        ignored = self._phase is _Phase.LEAVING and launcher.is_torchrun()
        for number, previous in self._previous.items():
            signal.signal(number, signal.SIG_IGN if ignored else previous)
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._writer, bytes([_CLOSED]))
        self._thread.join()
        os.close(self._writer)
        self._thread = None

    def __enter__(self) -> StopSignal:
        """Listen."""
        self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self.close()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._remember(number)

    def _remember(self, number: int) -> float:
        """Note a signal; return when it came first, in seconds of a clock that never runs backwards."""
        self.reason = self.reason or signal.Signals(number).name
        return self._first.setdefault(number, time.monotonic())

    def _wait(self, reader: int) -> None:
        """Body of the thread: take note of every signal, also while the main thread is busy elsewhere."""
        while (number := os.read(reader, 1)[0]) != _CLOSED:
            if number in SIGNALS:
                self._arrived(signal.Signals(number))
        os.close(reader)

    def _arrived(self, number: signal.Signals) -> None:
        phase, first = self._phase, self._remember(number)
        repeated = time.monotonic() - max(first, self._leaving_since) > SECONDS_OF_ONE_REQUEST
        if phase is _Phase.STARTING:
            if launcher.would_restart() and not launcher.forwards(number):
                launcher.end_agent()
            self._leave_now(
                ExitStatus.STOPPED,
                f"stopped by {number.name} before training began; nothing has changed; start the same command again",
            )
        elif phase is _Phase.TRAINING and repeated:
            self._leave_now(128 + number, f"{number.name} came again: leaving at once; what was not saved yet is lost")
        elif repeated:
            self._leave_now(self._status, f"{number.name} came while leaving: everything is saved, leaving at once")

    def _leave_now(self, status: int, message: str) -> None:
        launcher.say(message)
        # Nothing else works from a thread while the main thread waits inside a library.
        os._exit(status)


@functools.cache
def _shield_forked_children() -> None:
    """See to it, once, that a signal to a forked child is not taken for one to its parent, whose pipe it inherits."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
