"""A board on which every rank says how far it is, readable when no collective is: over ``torch.distributed``'s store.

A rank that hangs in a collective learns nothing from it. The store is another way: key and value over TCP to one
server, which is the launcher's agent under ``torchrun`` and so outlives every rank.

What it costs: ranks write on a timer and not per step, together at most ``MAX_WRITES_PER_S`` times a second: 2,048
ranks every 10 s. Reading all is one request for 2,048 values of some 30 bytes; it is done twice in a hang and at no
other time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

if TYPE_CHECKING:
    from lcl_megatron.parallel.groups import ProcessGroups

MAX_WRITES_PER_S = 200.0
"""Of all ranks together: a store that serves one request after the other is not kept busy by it."""
PREFIX = "lcl_heartbeats"
_STORE_TIMEOUT = timedelta(seconds=10)
"""A store that does not answer must not hold up what watches."""


class BoardError(RuntimeError):
    """The store is gone, with the process that served it."""


@dataclass(frozen=True)
class Beat:
    """What a rank last said of itself."""

    count: int
    """Beats so far: a rank whose count stands still is stopped or dead. Clocks of ranks are never compared."""
    step: int
    """Optimizer step it works on, 1 for the first."""
    phase: str
    """What it does in the step."""
    seconds: float
    """How long it had been in this phase when it wrote, on its own monotonic clock."""

    def to_text(self) -> str:
        """Return it as the store keeps it."""
        return f"{self.count} {self.step} {self.phase} {self.seconds:.1f}"

    @classmethod
    def from_text(cls, text: str) -> Beat:
        """Return what ``to_text`` wrote."""
        count, step, phase, seconds = text.split()
        return cls(int(count), int(step), phase, float(seconds))


class Heartbeats:
    """This rank's place on the board, and the sight of all others'.

    Alone, a process writes to a store of its own, which costs nothing.
    """

    def __init__(self, rank: int, world_size: int, store: Any, interval: float) -> None:
        """Open the board; ``open`` does it for a run.

        Args:
            rank: this rank.
            world_size: number of ranks.
            store: a store of ``torch.distributed``, best a clone of its own: a request waits for the one before it on
                the same connection.
            interval: seconds between two beats.
        """
        self.interval = interval
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._count = 0

    @classmethod
    def open(cls, groups: ProcessGroups, interval: float) -> Heartbeats:
        """Open the board of a run and wait until every rank has written once; collective over all ranks, on the host.

        Args:
            groups: process groups.
            interval: seconds between two beats; longer where so many ranks would keep the store busy.
        """
        default = _get_default_store()
        store = default.clone()  # type: ignore[attr-defined]  # missing from torch's annotations
        if store is not default:  # the store of a lone process has no connection to clone
            store.set_timeout(_STORE_TIMEOUT)
        own = dist.PrefixStore(PREFIX, store)  # type: ignore[attr-defined]  # missing from torch's annotations
        board = cls(groups.rank, groups.world_size, own, beat_interval(interval, groups.world_size))
        board.write(0, "start", 0.0)
        groups.barrier()
        return board

    def write(self, step: int, phase: str, seconds: float) -> None:
        """Say where this rank is.

        Args:
            step: optimizer step, 1 for the first.
            phase: one word.
            seconds: time since the phase began.

        Raises:
            BoardError: the store is gone.
        """
        self._count += 1
        try:
            self._store.set(str(self._rank), Beat(self._count, step, phase, seconds).to_text())
        except RuntimeError as error:
            raise BoardError(_gone(error)) from error

    def read(self) -> Sequence[Beat]:
        """Return the last beat of every rank, in the order of ranks.

        Raises:
            BoardError: the store is gone.
        """
        try:
            values = self._store.multi_get([str(rank) for rank in range(self._world_size)])
        except RuntimeError as error:
            raise BoardError(_gone(error)) from error
        return [Beat.from_text(value.decode()) for value in values]


def beat_interval(wanted: float, world_size: int) -> float:
    """Return the seconds between a rank's beats: as wanted, or longer where so many ranks would keep the store busy."""
    return max(wanted, world_size / MAX_WRITES_PER_S)


def _gone(error: RuntimeError) -> str:
    first = str(error).partition("\n")[0]
    return f"the store of torch.distributed does not answer, the process that serves it may have died: {first}"
