"""Files and folders that are whole or absent, whatever happens meanwhile: a kill, a power cut, a full disk.

Only the standard library is needed: the writer process imports this module.
"""

from __future__ import annotations

import os
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file in the place of the one that may be there; readers see the old content or the new.

    Args:
        path: the file; its folder is made.
        text: its new content.

    Raises:
        OSError: it cannot be written; what was there is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def commit_folder(staging: Path, final: Path) -> None:
    """Give a finished folder its name: when it has it, everything in it is on disk.

    Args:
        staging: the folder, beside its final place; files in subfolders are flushed too.
        final: its new name; must not exist.
    """
    for path in [*staging.rglob("*"), staging]:
        flush_to_disk(path)
    staging.rename(final)
    flush_to_disk(final.parent)
