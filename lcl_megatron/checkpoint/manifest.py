"""The manifest of a checkpoint: what belongs to it, to the byte. It proves that a checkpoint is whole.

``manifest.json`` names every file with its size and the SHA-256 of the bytes as they were written, the step, and the
attempt (one start of a run) that wrote it; its own last field is the SHA-256 of all the others. A hash finds accidents:
who can rewrite the files can rewrite the manifest too, so what is read is never executed either (``reader.py``).

Only the standard library is needed: the writer process imports this module.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

FORMAT = "lcl_megatron checkpoint"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
"""Name of the folder of a complete checkpoint."""
_PIECE = 1 << 22
_CERTAIN = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG})
"""Errors that say that a file is not there, and not that it cannot be read just now."""
_ATTEMPTS_TO_READ, _SECONDS_BETWEEN_READS = 3, 1.0
T = TypeVar("T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used for this run."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose files are not those that were written."""


class UnreadableCheckpointError(DamagedCheckpointError):
    """A checkpoint whose files cannot be read here and now; whether they are damaged is not known."""


@dataclass(frozen=True)
class FileEntry:
    """What a file of a checkpoint holds."""

    size: int
    """Bytes."""
    sha256: str
    """SHA-256 of its bytes, as hex."""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file."""

    text: str
    """For messages; begins with the file's name."""
    is_certain: bool = True
    """False = the file system would not let it be read, as one node's may for a while."""


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
        CheckpointError: it is intact, and of another version's format.
        DamagedCheckpointError: there is none, it was changed after it was written, it belongs to another step than the
            folder's name says, or it names files outside the folder.
        UnreadableCheckpointError: the file system does not let it be read.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(_patiently(lambda: path.read_text(encoding="utf-8")))
        recorded = content.pop("sha256")
        found = content["format"], content["format_version"]
        is_intact = recorded == _content_hash(content)
        files = {name: FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        manifest = Manifest(int(content["step"]), str(content["attempt"]), files)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"{folder} has no {MANIFEST_FILE}: it is no complete checkpoint of this version"
        ) from error
    except OSError as error:
        kind = DamagedCheckpointError if error.errno in _CERTAIN else UnreadableCheckpointError
        raise kind(f"{path} cannot be read: {error.strerror}") from error
    # Damaged JSON raises nearly anything, down to RecursionError.
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {type(error).__name__} {error}") from error
    if not is_intact:
        raise DamagedCheckpointError(f"{path} was changed after it was written: it contradicts its own hash")
    if found != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: format {found}; this version reads {(FORMAT, FORMAT_VERSION)}: take the version that wrote it"
        )
    named = STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        raise DamagedCheckpointError(f"{path} belongs to step {manifest.step}, and not to a folder of this name")
    if outside := [name for name in files if PurePath(name).name != name or name in ("", "..") or "\0" in name]:
        raise DamagedCheckpointError(f"{path} names files outside the checkpoint: {outside[0]!r}")
    return manifest


def damage_of(folder: Path, name: str, entry: FileEntry) -> Damage | None:
    """Return what is wrong with a file of a checkpoint; None = nothing. Reads all of it."""
    path = folder / name
    try:
        size = _patiently(path.stat).st_size
        if size != entry.size:
            return Damage(f"{name} holds {size} bytes instead of {entry.size}")
        is_same = _patiently(lambda: file_sha256(path)) == entry.sha256
        return None if is_same else Damage(f"{name} was changed after it was written")
    except OSError as error:
        return Damage(f"{name} cannot be read: {error.strerror}", is_certain=error.errno in _CERTAIN)


def verify(folder: Path) -> Manifest:
    """Read every file of a checkpoint, compare it with the manifest, and return that.

    Raises:
        DamagedCheckpointError: naming every file that is not as it was written.
    """
    manifest = read_manifest(folder)
    damages = [damage_of(folder, name, entry) for name, entry in manifest.files.items()]
    raise_damages(folder, damages)
    return manifest


def raise_damages(folder: Path, damages: list[Damage | None]) -> None:
    """Raise DamagedCheckpointError, or UnreadableCheckpointError where no damage is certain, if there is any."""
    if found := [damage for damage in damages if damage]:
        kind = DamagedCheckpointError if any(damage.is_certain for damage in found) else UnreadableCheckpointError
        raise kind(f"{folder} is damaged: {'; '.join(damage.text for damage in found)}")


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


def _patiently(read: Callable[[], T]) -> T:
    """Read what a file system may refuse for a moment (a stale handle, a lost server), some times."""
    for _ in range(_ATTEMPTS_TO_READ - 1):
        try:
            return read()
        except OSError as error:
            if error.errno in _CERTAIN:
                raise
            time.sleep(_SECONDS_BETWEEN_READS)
    return read()


def _content_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
