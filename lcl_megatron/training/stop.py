"""Stopping between two steps when the scheduler asks for it (SIGTERM)."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class StopSignal:
    """Remembers that SIGTERM arrived; the loop then saves and ends after the step in progress.

    All ranks must stop after the same step, so a rank's request travels with the step's agreement.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Callable[[int, FrameType | None], object] | int | None = None

    def listen(self) -> None:
        """Take over SIGTERM; only possible in the main thread of a process."""
        self._previous = signal.signal(signal.SIGTERM, self._receive)

    def close(self) -> None:
        """Give SIGTERM back: a process that no longer trains ends at once when asked to."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
