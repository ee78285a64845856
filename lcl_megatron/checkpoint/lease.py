"""One run at a time in a folder of checkpoints.

``SAVE/.lease`` names who writes into the folder: host, process, and a counter that goes up every few seconds. It is
given up at the end. A run that finds one takes the folder over when the owner is a process of this machine that no
longer exists, or when the counter has stood still for ``EXPIRES_S``, measured by the run's own clock: clocks of
machines are not compared. Else it is refused.

A run that was taken for dead can publish nothing: a checkpoint is completed only while the lease is the same file.
No lock of the file system is used; network file systems do not keep them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lcl_megatron.checkpoint.manifest import CheckpointError

LEASE_FILE = ".lease"
BEAT_S = 3.0
"""Seconds between two signs of life."""
EXPIRES_S = 30.0
"""Without one for so long, the owner is taken for dead."""
_POLL_S = 0.2
_PROC = Path("/proc")


class LeaseError(CheckpointError):
    """Another run writes into the folder."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease."""

    attempt: str
    """Name of the start of the run."""
    host: str
    """Machine."""
    boot: str
    """Identity of its last start; empty = unknown."""
    namespace: str
    """Where its process numbers count (containers have their own); empty = unknown."""
    pid: int
    """Process."""
    born: str
    """When the process began, in its machine's ticks; empty = unknown."""

    @classmethod
    def this_process(cls, attempt: str) -> Owner:
        """Return this process as an owner."""
        return cls(attempt, socket.gethostname(), _boot(), _namespace(), os.getpid(), _born(os.getpid()))

    def is_gone(self) -> bool:
        """Whether it is known not to live any more: a process of this machine that has ended."""
        # A host of this name that was started another time may be another machine: containers' names are not unique.
        here = (socket.gethostname(), _boot(), _namespace())
        if not all(here) or (self.host, self.boot, self.namespace) != here or not self.born:
            return False
        return self.born != _born(self.pid) and not _is_hidden(self.pid)


class Lease:
    """The right to write into a folder of checkpoints; ``close`` gives it up.

    Args:
        root: the folder; it is made.
        attempt: name of this start of the run, unique.
        expires_s: how long a lease without a sign of life is respected.
        beat_s: seconds between signs of life.

    Raises:
        LeaseError: another run writes into it.
        OSError: the folder cannot be written.
    """

    def __init__(self, root: Path, attempt: str, expires_s: float = EXPIRES_S, beat_s: float = BEAT_S) -> None:
        self.path = root / LEASE_FILE
        self._owner = Owner.this_process(attempt)
        self._expires_s = expires_s
        self._descriptor = self._take()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._beating = threading.Thread(target=self._beat, args=(beat_s,), name="lease", daemon=True)
        self._beating.start()

    @property
    def identity(self) -> tuple[str, int, int]:
        """Path, device and inode: while the path has them, the lease is this run's."""
        held = os.fstat(self._descriptor)
        return str(self.path), held.st_dev, held.st_ino

    def renew(self) -> None:
        """Make sure of the lease before a checkpoint is written; a folder that was deleted is made again.

        Raises:
            LeaseError: another run has taken it over.
            OSError: the folder cannot be written.
        """
        if self._is_ours():
            return
        descriptor = self._take()
        with self._lock:
            os.close(self._descriptor)
            self._descriptor = descriptor

    def close(self) -> None:
        """Give the lease up; calling it again is harmless."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._beating.join()
        if self._is_ours():
            # In a folder that has become read-only it stays; it must not hide the error that the run ends with, and the
            # next run sees that its owner is gone.
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._descriptor)

    def _is_ours(self) -> bool:
        _, device, inode = self.identity
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (device, inode)

    def _take(self) -> int:
        """Return the descriptor of a lease that is this process's."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f"{LEASE_FILE}-{self._owner.attempt}")
        # Synchronous: on a network file system the others would else see a sign of life when the cache is flushed.
        descriptor = os.open(mine, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DSYNC, 0o644)
        try:
            os.write(descriptor, _content(self._owner, 0))
            while True:
                try:
                    # Unlike a rename, a link never replaces what is there.
                    os.link(mine, self.path)
                    return descriptor
                except FileExistsError:
                    self._wait_for_its_end()
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            mine.unlink()

    def _wait_for_its_end(self) -> None:
        """Return when the lease that is there is gone or has been put aside.

        Raises:
            LeaseError: its owner lives.
        """
        first = _read(self.path)
        if first is None:
            return
        owner, seen = first
        end = time.monotonic() + self._expires_s
        while not owner.is_gone() and time.monotonic() < end:
            time.sleep(_POLL_S)
            now = _read(self.path)
            if now is None:
                return
            if now != (owner, seen):
                raise LeaseError(
                    f"{self.path.parent} is being written by another run: process {now[0].pid} on {now[0].host}. Wait "
                    f"for it, stop it, or give another --save"
                )
        # Put aside before it is removed: if it is another run's by now, or has shown life since, it comes back.
        aside = self.path.with_name(f"{LEASE_FILE}-old-{self._owner.attempt}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if _read(aside) not in (None, first):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
            aside.unlink()

    def _beat(self, beat_s: float) -> None:
        count = 0
        while not self._stopped.wait(beat_s):
            count += 1
            # Into the file that was made, never by its name: that may be another run's by now.
            with self._lock, contextlib.suppress(OSError):
                os.pwrite(self._descriptor, _content(self._owner, count), 0)


def _content(owner: Owner, beat: int) -> bytes:
    return json.dumps(asdict(owner) | {"beat": f"{beat:012d}"}).encode() + b"\n"


def _read(path: Path) -> tuple[Owner, str] | None:
    """Return owner and counter of a lease; None if there is none. Of an unreadable one, its text is the counter."""
    text = ""
    for _ in range(5):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            content = json.loads(text)
            beat = str(content.pop("beat"))
            return Owner(**content), beat
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            time.sleep(0.05)  # it is being written
    # Of another version of this package, whose run lives if its text changes.
    return Owner("unreadable", "an unknown host", "", "", 0, ""), text


def _boot() -> str:
    with contextlib.suppress(OSError):
        return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink(_PROC / "self/ns/pid")
    return ""


def _born(pid: int) -> str:
    """Return when a process began; empty if it has ended, or nothing is known."""
    try:
        fields = (_PROC / f"{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    # A zombie has ended, though its parent has not asked yet.
    return "" if fields[0] in "ZX" else fields[19]


def _is_hidden(pid: int) -> bool:
    """Whether there is a process of which ``/proc`` tells nothing, as of other users' where it is so mounted."""
    if (_PROC / str(pid)).exists():
        return False
    with contextlib.suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
    return True
