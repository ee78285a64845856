"""Who encodes the shards: this process, processes of this machine, or a Ray cluster.

All run the same ``write_part`` and hand back parts in the order of the shards, so the corpus does not depend on them.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from lcl_megatron.data.preprocessing.shard_encoder import ShardTask, write_part

PARTS_AHEAD = 2
"""Finished shards that may wait for an earlier one, per worker; bounds the disk space used twice."""


class Engine(Protocol):
    """Encodes shards. Use as a context manager; leaving it ends all work."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *_: object) -> None: ...

    def submit(self, task: ShardTask) -> Callable[[], Path]:
        """Begin with a shard, or put it in a queue; returns a function that waits for the part.

        Raises:
            OSError: (the returned function, too) if a worker died, or the shard or the disk failed.
        """
        ...


class InProcess:
    """Encodes each shard when its part is asked for."""

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, task: ShardTask) -> Callable[[], Path]:
        """Return the work itself."""
        return lambda: write_part(task)


class LocalProcesses:
    """Encodes shards in processes of this machine, which end with this one however it ends."""

    def __init__(self, num_workers: int) -> None:
        # Spawned, not forked: a forked child would share this process's locks. The executor, unlike a multiprocessing
        # pool, reports a worker that was killed instead of waiting for it.
        self._pool = ProcessPoolExecutor(
            num_workers, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent
        )

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, task: ShardTask) -> Callable[[], Path]:
        """Queue a shard."""
        try:
            future = self._pool.submit(write_part, task)
        except (BrokenProcessPool, BrokenPipeError) as error:
            raise worker_died() from error

        def wait() -> Path:
            try:
                return future.result()
            except BrokenProcessPool as error:
                raise worker_died() from error

        return wait


class RayCluster:
    """Encodes shards as tasks of a Ray cluster, all of whose machines see the same files under the same names.

    A program that has already joined a cluster stays in it.

    Args:
        num_workers: CPUs of the cluster that is started where no address is given.
        address: Cluster to use; empty = start one on this machine.

    Raises:
        ConfigError: If ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, num_workers: int, address: str) -> None:
        self._ray = import_ray()
        self._joined_before = self._ray.is_initialized()
        if not self._joined_before:
            self._join(num_workers, address)
        self._write_part = self._ray.remote(num_cpus=1, max_retries=1)(write_part)

    def _join(self, num_workers: int, address: str) -> None:
        options: dict[str, Any] = {"address": address} if address else {"address": "local", "num_cpus": num_workers}
        if not address:
            options["include_dashboard"] = False
        try:
            self._ray.init(log_to_driver=False, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"cannot join the Ray cluster {address or 'of this machine'}: {error}; is --ray-address right, and "
                "did `ray start` run there?"
            ) from error

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._joined_before:
            self._ray.shutdown()

    def submit(self, task: ShardTask) -> Callable[[], Path]:
        """Queue a shard."""
        reference = self._write_part.remote(task)

        def wait() -> Path:
            try:
                return Path(self._ray.get(reference))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except self._ray.exceptions.RayError as error:
                raise worker_died() from error

        return wait


def make_engine(config: PreprocessConfig) -> Engine:
    """Return the engine that the configuration names."""
    if config.engine == "ray":
        return RayCluster(config.num_workers, config.ray_address)
    return InProcess() if config.num_workers == 1 else LocalProcesses(config.num_workers)


def parts_in_order(
    engine: Engine, tasks: Iterable[ShardTask], num_workers: int, started: Callable[[Path], None]
) -> Iterator[Path]:
    """Yield the parts of all tasks in their order, with a bounded number of them ahead of the one waited for.

    Args:
        engine: Who does the work.
        tasks: What is to be done.
        num_workers: Shards at a time.
        started: Called with the part of a task when it is submitted.
    """
    pending: deque[Callable[[], Path]] = deque()
    for task in tasks:
        started(task.part)
        pending.append(engine.submit(task))
        if len(pending) > num_workers * PARTS_AHEAD:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()


def end_with_parent() -> None:
    """End this process as soon as its parent has ended, in whatever way.

    A worker of a killed parent would otherwise wait for its next task for ever, or write what nobody reads.
    """

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def import_ray() -> Any:
    """Return the module ``ray``.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs the package ray: pip install 'lcl_megatron[ray]'") from error
    return ray


def worker_died() -> ChildProcessError:
    """Return the error to raise when a worker is gone; which shard it had is not known."""
    return ChildProcessError(
        "a worker process ended before its shard was encoded (killed, perhaps for want of memory); finished shards "
        "are kept: run the same command again, with fewer workers if it was the memory"
    )
