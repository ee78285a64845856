"""Forked processes: calls in a child, ranks that talk over gloo, and the certainty that nobody is left behind.

The campaign's own process imports torch, megatron-core and lcl_megatron once and then only forks: a start costs a tenth
of a second instead of the seconds that the imports take. It must never start a thread or a process group itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
SECONDS_TO_END = 10.0
"""After a launcher was killed, everything that it had started must be gone within this time."""
_FORK = multiprocessing.get_context("fork")


class ChildError(RuntimeError):
    """A forked process raised, died or did not answer in time."""


def die_with_parent() -> None:
    """Have this process killed when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose parent has died, so that none can hide."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants(process: int | None = None) -> list[psutil.Process]:
    """Return all living processes below one (default: this one), without those that have ended and wait to be reaped.

    Args:
        process: its id.
    """
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
    return found


def writers(process: int) -> list[int]:
    """Return the ids of the processes below one that write checkpoints."""
    found = []
    for child in descendants(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "shard_writer.py" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def wait_until_alone(seconds: float = SECONDS_TO_END) -> list[str]:
    """Reap children until none is left; return the command lines of those that survive, after killing them."""
    end = time.monotonic() + seconds
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                if time.monotonic() > end:
                    break
                time.sleep(0.002)
        except ChildProcessError:
            return []
    left = []
    for process in descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            left.append(f"{process.pid}: {' '.join(process.cmdline())}")
            process.kill()
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0)[0]:
            pass
    return left


def fork(body: Callable[[], int]) -> int:
    """Fork a process that dies with this one and ends with the status that ``body`` returns; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        _live(body)
    return process


def _live(body: Callable[[], int]) -> NoReturn:
    """Body of a forked process; never returns, so that nothing of the parent's runs at exit."""
    status = 1
    try:
        # The parent's garbage is not collected here: to destroy a process group is to wait for threads it has there.
        gc.freeze()
        die_with_parent()
        torch.set_num_threads(1)
        status = body()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def redirect_output(log: Path) -> None:
    """Send standard output and standard error of this process, and of what it starts, to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def call_on_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(rank, *arguments)`` on forked ranks with a default gloo group; return the results by rank.

    Args:
        function: any callable; what it returns must be picklable.
        world_size: number of ranks.
        arguments: inherited by the fork.
        timeout: seconds for all.

    Raises:
        ChildError: a rank raised, died or was too slow; all are dead then.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:

        def on_rank(rank: int) -> Callable[[], Any]:
            def call() -> Any:
                join_ranks(rank, world_size, Path(folder) / "store", timeout)
                return function(rank, *arguments)

            return call

        return _results([on_rank(rank) for rank in range(world_size)], timeout)


def call_in_children(calls: Sequence[tuple[Callable[..., Any], Sequence[Any]]], timeout: float = 120.0) -> list[Any]:
    """Make calls (function, arguments) at the same time, each in a forked process; return their results in order.

    Raises:
        ChildError: one raised, died or was too slow; all are dead then.
    """
    return _results([functools.partial(function, *arguments) for function, arguments in calls], timeout)


def call_in_child(function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> Any:
    """Call ``function(*arguments)`` in a forked process, and return its result; raises as ``call_in_children``."""
    return call_in_children([(function, arguments)], timeout)[0]


def join_ranks(rank: int, world_size: int, store: Path, timeout: float) -> None:
    """Start the default gloo group of a forked rank, with the environment that a launcher sets.

    Args:
        rank: this rank.
        world_size: all ranks.
        store: a file that does not exist yet, the same for all.
        timeout: seconds for a collective.
    """
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    shared = dist.FileStore(str(store), world_size)
    dist.init_process_group("gloo", store=shared, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    # Nobody may leave while others still connect to it.
    shared.set(f"connected {rank}", "")
    shared.wait([f"connected {other}" for other in range(world_size)], timedelta(seconds=timeout))


def _results(calls: Sequence[Callable[[], Any]], timeout: float) -> list[Any]:
    """Make each call in a forked process of its own; return the results in order."""
    pipes = [_FORK.Pipe() for _ in calls]
    processes = [fork(lambda i=i: _answer(pipes[i][1], calls[i])) for i in range(len(calls))]
    for _, theirs in pipes:
        theirs.close()
    try:
        return _received([ours for ours, _ in pipes], timeout)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        for ours, _ in pipes:
            ours.close()


def _answer(connection: Connection, call: Callable[[], Any]) -> int:
    """Send what a call returns, or its traceback, and wait to be killed: who leaves early resets connections."""
    redirect_output(Path(os.devnull))
    try:
        connection.send((True, call()))
    except BaseException:
        connection.send((False, traceback.format_exc()))
    connection.poll(None)
    return 0


def _received(connections: list[Connection], timeout: float) -> list[Any]:
    """Return every process's result."""
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    while missing := [number for number in range(len(connections)) if number not in results]:
        ready = wait([connections[number] for number in missing], max(0.0, end - time.monotonic()))
        if not ready:
            raise ChildError(f"processes {missing} of {len(connections)} did not answer within {timeout:.0f} s")
        for number in (number for number in missing if connections[number] in ready):
            try:
                succeeded, results[number] = connections[number].recv()
            except EOFError:
                raise ChildError(f"process {number} of {len(connections)} died without an answer") from None
            if not succeeded:
                raise ChildError(f"process {number} of {len(connections)}:\n{results[number]}")
    return [results[number] for number in range(len(connections))]
