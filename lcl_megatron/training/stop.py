"""Stopping between two steps when the scheduler asks for it (SIGTERM)."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Remembers that SIGTERM arrived; the loop then saves and ends after the step in progress.

    All ranks must stop after the same step, so a rank's request travels with the step's agreement.
    """

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Take over SIGTERM; only possible in the main thread of a process."""
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
