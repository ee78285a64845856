"""Run a function on several ranks: forked processes that talk over gloo.

Forking costs about a tenth of a second per rank, because the parent has imported torch and megatron-core once; a
launcher would import them anew in every rank. Any function works, closures and test-local functions too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_FORK = multiprocessing.get_context("fork")
_GRACE_S = 2.0
"""How long the other ranks may go on after one has failed, so that the report names their errors too."""


class RankError(AssertionError):
    """One or more ranks failed or hung; the message holds every rank's traceback, the earliest first."""


@dataclass
class _Rank:
    """A forked rank, as the parent sees it."""

    rank: int
    process: BaseProcess
    connection: Connection
    result: Any = None
    report: str = ""
    """Empty unless the rank failed."""
    finished: bool = field(default=False)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank and return the results in rank order.

    Each rank has a default gloo process group over all ranks, one torch thread, and ``RANK``, ``WORLD_SIZE`` and
    ``LOCAL_RANK`` set. What it returns must be picklable.

    Args:
        fn: any callable.
        world_size: number of ranks.
        args: passed on; inherited by the fork, so they need not be picklable.
        timeout: seconds after which ranks that have not returned are killed and reported.

    Raises:
        RankError: a rank raised, died or hung. No process is left behind in any case.
    """
    if dist.is_initialized():
        raise RuntimeError("torch.distributed runs in the parent; destroy its process group before run_distributed")
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = Path(folder) / "store"
        ranks = [_fork(fn, rank, world_size, args, store, timeout) for rank in range(world_size)]
        try:
            failures = _collect(ranks, timeout)
        finally:
            _kill(ranks)
    if failures:
        raise RankError(f"{len(failures)} of {world_size} ranks failed, the earliest first:\n\n" + "\n".join(failures))
    return [rank.result for rank in ranks]


def _fork(
    fn: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], store: Path, timeout: float
) -> _Rank:
    """Start one rank."""
    ours, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_rank_main, args=(theirs, fn, rank, world_size, args, store, timeout))
    process.start()
    theirs.close()
    return _Rank(rank, process, ours)


def _rank_main(
    connection: Connection,
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    store: Path,
    timeout: float,
) -> None:
    """Body of a rank; never returns, so that nothing of the parent's (pytest's) runs at exit."""
    os.setpgid(0, 0)
    # The parent's garbage is not collected here: to destroy a process group is to wait for threads that it has there.
    gc.freeze()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the parent, whatever kills it
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        shared = dist.FileStore(str(store), world_size)  # type: ignore[attr-defined]  # missing from annotations
        dist.init_process_group(
            "gloo", store=shared, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        # Nobody may leave, as a function without communication would at once, while others still connect to it.
        shared.set(f"connected {rank}", "")
        shared.wait([f"connected {other}" for other in range(world_size)], timedelta(seconds=timeout))
        message = pickle.dumps((True, fn(rank, world_size, *args)))
    except BaseException:  # SystemExit and pytest's outcomes too: the parent must hear of them
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
        os._exit(1)
    connection.send_bytes(message)
    # A rank that leaves early resets connections that others still read; the parent ends all together.
    connection.poll(None)
    os._exit(0)


def _collect(ranks: list[_Rank], timeout: float) -> list[str]:
    """Receive every rank's outcome; return the failures in order of arrival."""
    failures: list[str] = []
    end = time.monotonic() + timeout
    while open_ranks := [rank for rank in ranks if not rank.finished]:
        left = end - time.monotonic()
        ready = wait([rank.connection for rank in open_ranks], max(0.0, left))
        if not ready:
            limit = f"{timeout:.0f} s" if not failures else f"{_GRACE_S:.0f} s after the first failure"
            failures += [f"rank {rank.rank} was still running after {limit}; killed" for rank in open_ranks]
            return failures
        for rank in (rank for rank in open_ranks if rank.connection in ready):
            _receive(rank)
            if rank.report:
                if not failures:
                    end = min(end, time.monotonic() + _GRACE_S)
                failures.append(rank.report)
    return failures


def _receive(rank: _Rank) -> None:
    """Read one rank's outcome, or learn that it died."""
    rank.finished = True
    try:
        succeeded, outcome = pickle.loads(rank.connection.recv_bytes())
    except EOFError:
        rank.process.join()
        code = rank.process.exitcode or 0
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        rank.report = f"rank {rank.rank} died without a report: {reason}"
        return
    if succeeded:
        rank.result = outcome
    else:
        rank.report = f"rank {rank.rank}:\n{outcome}"


def _kill(ranks: list[_Rank]) -> None:
    """End all ranks and whatever they started."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):  # it has not made its group yet, or all of the group is gone
            os.killpg(rank.process.pid or 0, signal.SIGKILL)
        rank.process.kill()
    for rank in ranks:
        rank.process.join()
        rank.connection.close()
