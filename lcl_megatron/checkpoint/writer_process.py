"""The rank's side of its writer process: memory that both share, requests, answers; see ``shard_writer.py``."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcl_megatron.checkpoint import shard_writer

_SECONDS_TO_DIE = 5.0
_ALIGNMENT = 4096
_NOT_FOR_IT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals to the whole process group that mean the rank; see ``shard_writer.main``."""
_PACKAGE_ROOT = Path(__file__).parents[2]


class WriteError(RuntimeError):
    """A writer process that could not do its work, or died."""


@dataclass(frozen=True)
class NewFile:
    """A file that is to be written."""

    name: str
    """Its name."""
    size: int
    """Its bytes."""
    fill: Callable[[memoryview], None]
    """Puts them into ``size`` bytes of memory."""


class WriterProcess:
    """One writer process. It is started when it is first needed, and again when it has died.

    A request is answered before the next one is made: ``submit`` or ``complete``, then ``answer`` until there is one.
    """

    def __init__(self) -> None:
        self._shared = _anonymous_file()
        self._memory: mmap.mmap | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        """Where it answers; open while there is a process."""
        self._received = b""
        self._began = 0.0

    @property
    def pid(self) -> int | None:
        """Process id while there is a process."""
        return self._process.pid if self._process is not None else None

    @property
    def busy_s(self) -> float:
        """Seconds since the last request was made, on a clock that never jumps."""
        return time.monotonic() - self._began

    def submit(self, folder: Path, files: Sequence[NewFile]) -> None:
        """Copy files into the shared memory and have them written; returns when they are copied.

        Args:
            folder: where they go; must exist.
            files: what they hold.

        Raises:
            WriteError: there is no memory for them, or no process can be started.
        """
        places, end = [], 0
        for file in files:
            begin = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = begin + file.size
            places.append((file.name, begin, end))
        try:
            memory = self._memory_of(end)
            with memoryview(memory) as whole:
                for file, (_, begin, stop) in zip(files, places, strict=True):
                    with whole[begin:stop] as part:
                        file.fill(part)
        except (OSError, MemoryError, ValueError) as error:
            raise WriteError(f"no memory for {end / 1e9:.3f} GB of a checkpoint: {error}") from error
        self._request({"write": {"folder": str(folder), "files": places}})

    def complete(self, **request: Any) -> None:
        """Have a checkpoint completed; the arguments are those of ``shard_writer.complete``."""
        self._request({"complete": request})

    def answer(self, wait_s: float = 0.0) -> dict[str, Any] | None:
        """Return the answer to the request, None if there is none yet.

        Args:
            wait_s: wait so long for it.

        Raises:
            WriteError: the work failed or the process died; the message says what happened to which file.
        """
        process = self._process
        if process is None:
            raise WriteError("the writer process is gone")
        end = time.monotonic() + wait_s
        while b"\n" not in self._received:
            # Not ``select``: it refuses descriptors above 1023, and a rank may have that many.
            poll = select.poll()
            poll.register(self._answers, select.POLLIN)
            if not poll.poll(1000 * max(0.0, end - time.monotonic())):
                return None
            received = os.read(self._answers, 1 << 16)
            if not received:
                self._forget()
                raise WriteError(f"the writer process {process.pid} died (exit status {process.returncode})")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WriteError(answer["error"])
        return answer

    def kill(self) -> None:
        """End the process whatever it does; the next request starts another."""
        if self._process is not None:
            self._process.kill()
            self._forget()

    def close(self) -> None:
        """End the process and give the memory back."""
        self.kill()
        self._memory = None
        if self._shared >= 0:
            os.close(self._shared)
            self._shared = -1

    def _memory_of(self, size: int) -> mmap.mmap:
        """Return shared memory of at least some bytes."""
        if self._memory is None or len(self._memory) < size:
            self._memory = None
            os.ftruncate(self._shared, max(size, _ALIGNMENT))
            self._memory = mmap.mmap(self._shared, max(size, _ALIGNMENT))
        return self._memory

    def _request(self, request: dict[str, Any]) -> None:
        self._began = time.monotonic()
        line = json.dumps(request).encode() + b"\n"
        for attempt in range(2):
            process = self._started()
            assert process.stdin is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                return
            except OSError as error:
                # It died since the last answer: the second attempt is with a new one.
                self._forget()
                if attempt:
                    raise WriteError(f"the writer process cannot be started: {error}") from error

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._forget()
        if self._process is None:
            path = os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]))
            # -P: the folder of the script is not searched for modules.
            try:
                own, answers = os.pipe()
            except OSError as error:
                raise WriteError(f"the writer process cannot be started: {error}") from error
            numbers = map(str, (self._shared, answers, os.getpid()))
            command = [sys.executable, "-P", str(shard_writer.__file__), *numbers]
            # Inherited blocked: a request to stop comes more than once, and this process is often started for it. One
            # that came before it could ignore the signal would end it, and the last checkpoint with it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_IT)
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    pass_fds=[self._shared, answers],
                    env=os.environ | {"PYTHONPATH": path},
                )
            except OSError as error:
                os.close(own)
                raise WriteError(f"the writer process cannot be started: {error}") from error
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                os.close(answers)
            self._answers = own
        return self._process

    def _forget(self) -> None:
        """Drop a process that has ended or is about to."""
        if self._process is not None:
            process, self._process, self._received = self._process, None, b""
            with contextlib.suppress(subprocess.TimeoutExpired):  # it cannot die while the kernel waits for a disk
                process.wait(_SECONDS_TO_DIE)
            os.close(self._answers)
            self._answers = -1
            if process.stdin is not None:
                with contextlib.suppress(OSError):  # what it never read is lost with it
                    process.stdin.close()


def _anonymous_file() -> int:
    """Return the descriptor of a file without a name, in memory where the system has that; it ends with its users."""
    if hasattr(os, "memfd_create"):
        try:
            return os.memfd_create("checkpoint")
        except OSError:
            pass  # a sandbox that does not know the call
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
