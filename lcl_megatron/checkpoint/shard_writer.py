"""The process beside a rank that writes its part of checkpoints while training goes on.

The rank lays out its files in memory that both share, and goes on; this process writes them, flushes them to disk and
says size and SHA-256 of each. Beside rank 0 it then completes the checkpoint: index, manifest, one rename. It does not
outlive its rank. Nothing but the standard library is imported: it starts in a twentieth of a second.

Requests and answers are lines of JSON, on standard input and on a pipe of their own: what a site's start-up files or
preloaded libraries print on standard output is no answer. Started by ``writer_process.py``.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from lcl_megatron.checkpoint.durable_files import flush_to_disk
from lcl_megatron.checkpoint.manifest import (
    MANIFEST_FILE,
    STEP_FOLDER,
    FileEntry,
    Manifest,
    write_file,
)
from lcl_megatron.checkpoint.shard_file import INDEX_FILE, index_of, index_text
from lcl_megatron.parallel.parent_process import die_with_parent

STAGING_PREFIX = ".staging-"
"""Begin of the name of a folder that is being written."""
PRUNED_PREFIX = ".pruned-"
"""Begin of the name of a folder that is being deleted."""
PIECES_SUFFIX = ".safetensors"
_LOOKS, _SECONDS_BETWEEN_LOOKS = 25, 0.2


def main() -> None:
    """Answer requests until standard input ends."""
    shared, answers, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Signals to the whole process group are for the rank: it finishes its checkpoint, for which it needs this process.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = write(shared, **request["write"]) if "write" in request else complete(**request["complete"])
        # Whatever it is, the rank has to hear of it.
        except Exception as error:
            answer = {"error": str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"}
        said = memoryview(json.dumps(answer).encode() + b"\n")
        while said:
            said = said[os.write(answers, said) :]


def write(shared: int, folder: str, files: list[tuple[str, int, int]]) -> dict[str, Any]:
    """Write files from the shared memory.

    Args:
        shared: descriptor of the memory.
        folder: where they go; must exist.
        files: name of each, and where its bytes begin and end in the memory.

    Returns:
        ``{"files": {name: [size, sha256]}}``.
    """
    written: dict[str, list[Any]] = {}
    if files:
        # Not closed by name: while an error is on its way, its traceback holds views of it.
        memory = memoryview(mmap.mmap(shared, max(end for _, _, end in files), prot=mmap.PROT_READ))
        for name, begin, end in files:
            entry = write_file(Path(folder) / name, memory[begin:end])
            written[name] = [entry.size, entry.sha256]
    return {"files": written}


def complete(
    staging: str,
    final: str,
    step: int,
    attempt: str,
    files: dict[str, tuple[int, str]],
    lease: tuple[str, int, int] | None,
    keep: tuple[int, int],
) -> dict[str, Any]:
    """Make a checkpoint of the files that all ranks have written.

    Args:
        staging: folder with the files.
        final: its new name.
        step: optimizer steps done.
        attempt: name of this start of the run.
        files: size and SHA-256 of every file, as its rank says.
        lease: path, device and inode of the lease, which must still be this run's; None = no lease is held.
        keep: how many of the newest checkpoints stay, 0 = all, and of which multiples of steps.

    Returns:
        ``{"completed": final, "pruned": [names], "not_pruned": [reasons]}``.
    """
    folder = Path(staging)
    entries = {name: FileEntry(*entry) for name, entry in files.items()}
    for name, entry in entries.items():
        _wait_until_seen(folder / name, entry.size)
    index = index_text(index_of([folder / name for name in sorted(entries) if name.endswith(PIECES_SUFFIX)]))
    entries[INDEX_FILE] = write_file(folder / INDEX_FILE, index.encode())
    write_file(folder / MANIFEST_FILE, Manifest(step, attempt, entries).text().encode())
    flush_to_disk(folder)
    if lease is not None:
        _require_lease(*lease)
    os.rename(folder, final)
    flush_to_disk(Path(final).parent)
    # It is complete, whatever becomes of the old ones.
    pruned, not_pruned = prune(Path(final).parent, step, *keep)
    return {"completed": final, "pruned": pruned, "not_pruned": not_pruned}


def prune(root: Path, newest: int, keep_last: int, keep_every: int) -> tuple[list[str], list[str]]:
    """Delete old checkpoints. Links, and what is no folder, are not this run's: they neither count nor go.

    Args:
        root: folder of checkpoints.
        newest: step of the one that has just been completed. Those of later steps, which a run that went back to this
            one's past could not put aside, neither count nor go: this one would be the oldest beside them.
        keep_last: how many of the newest stay; 0 = all.
        keep_every: those whose step is a multiple of this stay too; 0 = none.

    Returns:
        Names of those deleted, and why others could not be.
    """
    if not keep_last:
        return [], []
    deleted: list[str] = []
    failed: list[str] = []
    try:
        found = [(STEP_FOLDER.fullmatch(path.name), path) for path in root.iterdir()]
        steps = {int(name[1]): path for name, path in found if name and path.is_dir() and not path.is_symlink()}
    except OSError as error:
        return [], [str(error)]
    for step in sorted(step for step in steps if step <= newest)[:-keep_last]:
        if keep_every and step % keep_every == 0:
            continue
        # Renamed first: what is half deleted has no name of a checkpoint.
        condemned = root / f"{PRUNED_PREFIX}{steps[step].name}"
        try:
            os.rename(steps[step], condemned)
        except OSError as error:
            failed.append(str(error))
            continue
        shutil.rmtree(condemned, ignore_errors=True)
        deleted.append(steps[step].name)
    return deleted, failed


def _wait_until_seen(path: Path, size: int) -> None:
    """Wait until a file that another node has written is seen here; network file systems take a moment."""
    for look in range(_LOOKS):
        if look:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        try:
            if path.stat().st_size == size:
                return
        except FileNotFoundError:
            continue
    raise OSError(
        f"{path} is written, but not seen by rank 0 with its {size} bytes: checkpoint.save must be on a file system "
        "that all nodes share"
    )


def _require_lease(path: str, device: int, inode: int) -> None:
    found = os.stat(path)
    if (found.st_dev, found.st_ino) != (device, inode):
        raise OSError(f"{path} belongs to another run by now: two runs write into one folder")


if __name__ == "__main__":
    main()
