"""How long a rank works by itself: the time inside the model's forward passes, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MAX_PENDING = 64
"""Pairs of events kept before those that the device has passed are added up."""


class WorkClock:
    """Adds up the time of stretches of work on one device.

    On a GPU a stretch is what the device does between two events of its stream, read when it is long over; elsewhere
    it is the time that the host spends. What ranks wait for in transfers between stages, in reductions and in the
    contrast is outside the stretches; what tensor- and context-parallel peers wait for inside their layers is not, and
    with ``overlap_param_gather`` neither is the arrival of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self.stretches = 0
        """Stretches that have begun; one more says that the rank gets on."""
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        self.stretches += 1
        if not self._is_cuda:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._pending.append((first, last))
        if len(self._pending) >= _MAX_PENDING:
            self._fold(wait=False)

    def take(self) -> float:
        """Return the seconds since the last call, and start anew; waits until the device has passed all stretches."""
        self._fold(wait=True)
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _fold(self, wait: bool) -> None:
        """Add up the stretches that are over: in the order of the stream, up to the first that is not."""
        done = 0
        for first, last in self._pending:
            if wait:
                last.synchronize()
            elif not last.query():
                break
            self._seconds += first.elapsed_time(last) / 1000
            done += 1
        del self._pending[:done]
