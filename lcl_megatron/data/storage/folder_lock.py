"""One writer at a time for a folder that its writer moves away when it has finished."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import BinaryIO

from lcl_megatron.config.errors import ConfigError

LOCK_PATIENCE = 1.0
"""Seconds to wait for the lock: a writer that was killed while it started a worker holds it a moment longer."""


def lock_folder(folder: Path) -> BinaryIO:
    """Make a folder, lock its file ``lock``, and return the file; the lock ends with it, or with the process.

    Raises:
        ConfigError: If another process holds the lock, and does not end within ``LOCK_PATIENCE``.
    """
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(folder / "lock", "wb")
        except FileNotFoundError:
            continue  # another writer has just finished and moved the folder away
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (folder / "lock").exists() and os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                return lock
            lock.close()
        except BlockingIOError as error:
            lock.close()
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another process is writing into {folder} (it holds {folder / 'lock'}); "
                    "wait for it, or choose another --output"
                ) from error
            time.sleep(0.05)
