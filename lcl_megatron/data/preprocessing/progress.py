"""How far preprocessing has come: counters that workers leave in files, and the line that shows their sum.

A worker writes its counters to a small file beside its part about once a second; whoever shows progress reads the
files. So counting needs no connection between processes, works on any machine that shares the file system, and
costs a worker nothing but a look at the clock for each document.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from lcl_megatron.data.storage.corpus_part import Totals

REPORT_SECONDS = 1.0
"""Between two reports of a worker."""
TERMINAL_SECONDS = 1.0
"""Between two updates of the line on a terminal."""
LOG_SECONDS = 10.0
"""Between two lines of output that is no terminal."""


@dataclass
class Counters:
    """Work done, on one shard or on many."""

    documents: int = 0
    """Documents kept."""
    images: int = 0
    """Images kept."""
    rejects: int = 0
    """Documents and images left out."""
    image_bytes: int = 0
    """Bytes of the images kept, in their source files."""
    input_bytes: int = 0
    """Bytes of shards read."""

    LAYOUT = struct.Struct("<5q")

    @classmethod
    def of(cls, totals: Totals, input_bytes: int) -> Counters:
        """Return the counters of a part from its counts."""
        rejects = totals.rejected_documents.total() + totals.rejected_images.total()
        return cls(totals.documents, totals.images, rejects, totals.source_image_bytes, input_bytes)

    def add(self, other: Counters) -> None:
        """Add the counters of other work."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def pack(self) -> bytes:
        """Return the counters as bytes."""
        return self.LAYOUT.pack(*vars(self).values())

    @classmethod
    def unpack(cls, data: bytes) -> Counters:
        """Return the counters that ``pack`` made bytes of; none if it has not written all of them yet."""
        return cls(*cls.LAYOUT.unpack(data)) if len(data) == cls.LAYOUT.size else cls()


class ShardReport:
    """The worker's side: counters of one shard, left in a file from time to time.

    Args:
        path: File to write.
        shard: The shard that is read; how far it was read is asked of the file that the reader holds open.
    """

    def __init__(self, path: Path, shard: Path) -> None:
        self._path = path
        self._shard = shard
        self._next = time.monotonic() + REPORT_SECONDS

    def tick(self, totals: Totals) -> None:
        """Write the counts so far if it is time; call it often."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + REPORT_SECONDS
        try:
            self._path.write_bytes(Counters.of(totals, read_position(self._shard)).pack())
        except OSError:
            pass  # Counters are for the eye. A disk that fails is reported by the part itself.


def report_path(part: Path) -> Path:
    """Return where the counters of a part that is being written stand."""
    return part.with_name(f"{part.name}.progress")


def read_position(shard: Path) -> int:
    """Return how many bytes of a file this process has read: the furthest position of its open descriptors.

    0 where the system does not say, or where the reader does not keep the file open.
    """
    try:
        wanted, furthest = os.stat(shard), 0
        for name in os.listdir("/dev/fd"):
            try:
                if os.path.samestat(os.fstat(int(name)), wanted):
                    furthest = max(furthest, os.lseek(int(name), 0, os.SEEK_CUR))
            except OSError:
                continue
    except OSError:
        return 0
    return furthest


class Progress:
    """The reader's side: shows the state of a run on a stream, until it is closed. Use as a context manager.

    A terminal gets one line that changes; any other stream gets a line every ``LOG_SECONDS``.

    Args:
        stream: Where to show it; None = nowhere.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._is_terminal = stream is not None and stream.isatty()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._finished = Counters()
        self._running: dict[str, Path] = {}
        self._input_bytes = 0
        self._shards = self._shards_done = self._bytes_before = 0
        self._begin = time.monotonic()

    def __enter__(self) -> Progress:
        if self._stream is not None:
            self._thread = threading.Thread(target=self._show_until_stopped, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_terminal and self._stream is not None:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def begin(self, shard_bytes: Iterable[int], done: int) -> None:
        """Say what is to be done: the size of every shard, and how many of them an earlier run has done."""
        sizes = list(shard_bytes)
        with self._lock:
            self._begin = time.monotonic()
            self._input_bytes, self._shards = sum(sizes), len(sizes)
            self._shards_done, self._bytes_before = done, sum(sizes[:done])
        if done:
            self.note(f"taking up an interrupted run: {done} of {len(sizes)} shards are done")

    def shard_started(self, part: Path) -> None:
        """Look at the counters of a part from now on."""
        with self._lock:
            self._running[part.name] = report_path(part)

    def shard_finished(self, part: Path, counters: Counters) -> None:
        """Replace the reports of a part by its final counters."""
        with self._lock:
            path = self._running.pop(part.name, None)
            self._finished.add(counters)
            self._shards_done += 1
        if path is not None:
            path.unlink(missing_ok=True)

    def note(self, line: str) -> None:
        """Show a line that stays."""
        if self._stream is not None:
            self._stream.write(f"\r\x1b[K{line}\n" if self._is_terminal else f"{line}\n")
            self._stream.flush()

    def line(self) -> str:
        """Return the state of the run in one line."""
        with self._lock:
            total, paths = Counters(), list(self._running.values())
            total.add(self._finished)
            seconds = max(time.monotonic() - self._begin, 1e-3)
            shards, done, before = self._shards, self._shards_done, self._bytes_before
        for path in paths:
            try:
                total.add(Counters.unpack(path.read_bytes()))
            except OSError:
                continue
        rate = (total.input_bytes + total.image_bytes) / seconds
        share = (before + total.input_bytes) / max(self._input_bytes, 1)
        left = (self._input_bytes - before - total.input_bytes) / max(total.input_bytes, 1) * seconds
        time_left = f"{duration(left)} left" if total.input_bytes else "time left unknown"
        # The most important first: a narrow terminal cuts the end off.
        return (
            f"{min(share, 1):4.0%}, {time_left} | {rate / 1e6:,.1f} MB/s | {done:,}/{shards:,} shards | "
            f"{total.documents:,} documents, {total.images:,} images, {total.rejects:,} rejects"
        )

    def _show_until_stopped(self) -> None:
        while not self._stop.wait(TERMINAL_SECONDS if self._is_terminal else LOG_SECONDS):
            if self._shards:
                self._show(self.line())

    def _show(self, line: str) -> None:
        if self._stream is None:
            return
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns
            self._stream.write(f"\r{line[: columns - 1]}\x1b[K")
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Return a time as people say it: ``3:07`` minutes, ``5:12:09`` hours."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
