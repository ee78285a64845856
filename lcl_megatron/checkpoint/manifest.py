"""The manifest of a checkpoint: what belongs to it, to the byte. It proves that a checkpoint is whole.

``manifest.json`` names every file with its size and the SHA-256 of the bytes as they were written, the step, and the
attempt (one start of a run) that wrote it; its own last field is the SHA-256 of all the others. A hash finds accidents:
who can rewrite the files can rewrite the manifest too, so what is read is never executed either (``reader.py``).

Only the standard library is needed: the writer process imports this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

FORMAT = "lcl_megatron checkpoint"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
"""Name of the folder of a complete checkpoint."""
_PIECE = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that cannot be used for this run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not those that were written."""


@dataclass(frozen=True)
class FileEntry:
    """What a file of a checkpoint holds."""

    size: int
    """Bytes."""
    sha256: str
    """SHA-256 of its bytes, as hex."""


@dataclass(frozen=True)
class Manifest:
    """What belongs to a checkpoint."""

    step: int
    """Optimizer steps done."""
    attempt: str
    """Name of the start of the run that wrote it."""
    files: dict[str, FileEntry]
    """By name; all are in the folder itself."""

    def text(self) -> str:
        """Return the manifest as JSON, with the hash of its content as the last field."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "attempt": self.attempt,
            "files": {name: vars(self.files[name]) for name in sorted(self.files)},
        }
        return json.dumps(content | {"sha256": _content_hash(content)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint; no other file is read.

    Raises:
        DamagedCheckpointError: there is none, it was changed after it was written, it belongs to another step than the
            folder's name says, or it names files outside the folder.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = content.pop("sha256")
        found = content["format"], content["format_version"]
        is_intact = recorded == _content_hash(content)
        files = {name: FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        manifest = Manifest(int(content["step"]), str(content["attempt"]), files)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{folder} has no {MANIFEST_FILE}: it is no complete checkpoint of this version"
        ) from error
    # Damaged JSON raises nearly anything, down to RecursionError.
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise DamagedCheckpointError(f"{path}: format {found}; this version reads {(FORMAT, FORMAT_VERSION)}")
    if not is_intact:
        raise DamagedCheckpointError(f"{path} was changed after it was written: it contradicts its own hash")
    named = STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise DamagedCheckpointError(f"{path} belongs to step {manifest.step}, and not to a folder of this name")
    if outside := [name for name in files if PurePath(name).name != name or name in ("", "..") or "\0" in name]:
        raise DamagedCheckpointError(f"{path} names files outside the checkpoint: {outside[0]!r}")
    return manifest


def damage_of(folder: Path, name: str, entry: FileEntry) -> str:
    """Return what is wrong with a file of a checkpoint; empty = nothing. Reads all of it."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"{name} holds {size} bytes instead of {entry.size}"
        return "" if file_sha256(path) == entry.sha256 else f"{name} was changed after it was written"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"


def verify(folder: Path) -> Manifest:
    """Read every file of a checkpoint, compare it with the manifest, and return that.

    Raises:
        DamagedCheckpointError: naming every file that is not as it was written.
    """
    manifest = read_manifest(folder)
    damages = [damage_of(folder, name, entry) for name, entry in manifest.files.items()]
    raise_damages(folder, damages)
    return manifest


def raise_damages(folder: Path, damages: list[str]) -> None:
    """Raise DamagedCheckpointError if any of some descriptions is not empty."""
    if found := [damage for damage in damages if damage]:
        raise DamagedCheckpointError(f"{folder} is damaged: {'; '.join(found)}")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_file(path: Path, content: memoryview | bytes) -> FileEntry:
    """Write a new file, flush it to disk, and return what the manifest says of it: the hash of what was to be written.

    Raises:
        OSError: the file exists or cannot be written; names the file.
    """
    view, digest = memoryview(content), hashlib.sha256()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            for begin in range(0, len(view), _PIECE):
                piece = view[begin : begin + _PIECE]
                digest.update(piece)
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # A failing write does not say which file it was.
        raise OSError(error.errno, error.strerror, str(path)) from error
    return FileEntry(len(view), digest.hexdigest())


def _content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
