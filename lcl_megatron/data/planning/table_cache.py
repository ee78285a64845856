"""Row tables on disk: built once, memory-mapped by all other processes of a machine or a cluster.

    CACHE/KEY/
        table.json      kind, what is left out, and CRC-32 of every array; written last
        NAME.npy        the arrays

KEY is the hash of all that decides a table. A folder gets its name when it is complete; what is damaged or cut short is
built again. The seed plays no part, so that runs share tables.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lcl_megatron.data.planning.build_table import BuiltTable, build_table
from lcl_megatron.data.planning.compose import Composer
from lcl_megatron.data.planning.row_table import PatternTable, WindowTable

if TYPE_CHECKING:
    from lcl_megatron.config.run import DataConfig

logger = logging.getLogger(__name__)

TABLE_FIELDS = (
    "seq_length",
    "min_similarity",
    "max_images_per_document",
    "too_many_images",
    "max_images_per_row",
    "layout",
)
"""Fields of ``DataConfig`` that decide which rows there are."""
TABLE_VERSION = 2
"""Goes up when the same documents give other rows, or rows in another order: tables are built again, and runs begun
under another version are not continued."""
CACHED_DOCUMENTS = 1 << 20
"""A corpus of fewer documents is looked through in less than a second, and nothing is written for it."""
KINDS = {kind.__name__: kind for kind in (PatternTable, WindowTable)}
CHECK_BYTES = 1 << 24
"""Bytes that are read at a time to check an array."""


def open_table(composer: Composer) -> BuiltTable:
    """Return the table of a composer's rows, from the cache if it is there, else built and stored.

    The cache is ``data.cache_dir``, or ``NAME.cache`` beside the corpus. Where it cannot be written, the table stays in
    memory. Several processes may ask at the same time: one builds, the others wait.

    Raises:
        ConfigError: See ``build_table``.
    """
    if composer.num_documents < CACHED_DOCUMENTS:
        return build_table(composer)
    folder = _cache_folder(composer) / table_key(composer)[:32]
    found, built = _load(folder), None
    if found is not None:
        return found
    try:
        with _lock(folder) as is_alone:
            found = _load(folder)
            if found is None:
                logger.info("planning the rows of %s (once; kept in %s)", composer.corpus.path, folder)
                built = build_table(composer)
                if is_alone:
                    _remove_remains(folder)
                _store(built, folder)
                # What was just written is mapped instead of held: memory that processes of this machine share.
                found = _load(folder)
    except OSError as error:
        logger.warning("cannot keep the table of rows in %s (%s); set data.cache_dir", folder, error)
    return found or built or build_table(composer)


def table_key(composer: Composer) -> str:
    """Return the hash (hex) of all that decides which rows there are, but not of their order."""
    config: DataConfig = composer.config
    settings = [(name, getattr(config, name)) for name in TABLE_FIELDS]
    parts = (TABLE_VERSION, composer.corpus.fingerprint, type(composer).__name__, composer.num_latents, settings)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _cache_folder(composer: Composer) -> Path:
    path = Path(os.path.abspath(composer.corpus.path))
    return Path(composer.config.cache_dir) if composer.config.cache_dir else path.with_name(f"{path.name}.cache")


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the right to build a table. False where the file system knows no locks: several processes build the same."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
            is_alone = True
        except OSError:
            logger.info("%s cannot be locked; every process builds its table", stream.name)
            is_alone = False
        yield is_alone


def _remove_remains(folder: Path) -> None:
    """Delete what processes that were killed had written; the lock says that none is writing now."""
    for staging in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(staging, ignore_errors=True)


def _store(built: BuiltTable, folder: Path) -> None:
    staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        sums = {}
        for name, array in built.table.arrays().items():
            np.save(staging / f"{name}.npy", array, allow_pickle=False)
            sums[name] = _checksum(staging / f"{name}.npy")
        info = {"kind": type(built.table).__name__, "left_out": built.left_out, "crc32": sums}
        (staging / "table.json").write_text(json.dumps(info), encoding="utf-8")
        os.chmod(staging, 0o755)
        try:
            os.rename(staging, folder)
        except OSError:
            # A damaged table is in the way; or, where nothing can be locked, the good one of a faster process.
            if _load(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _load(folder: Path) -> BuiltTable | None:
    """Return a stored table; None if there is none, or it is damaged."""
    try:
        info = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        arrays = {}
        for name, checksum in info["crc32"].items():
            path = folder / f"{name}.npy"
            if _checksum(path) != checksum:
                raise ValueError(f"{path} was changed after it was written")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray):  # of a zip file, np.load returns a dictionary
                raise ValueError(f"{path} is an archive")
            arrays[name] = np.asarray(array)
        return BuiltTable(KINDS[info["kind"]].from_arrays(arrays), info["left_out"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the table of rows in %s cannot be used (%s); it is built again", folder, error)
        return None


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as stream:
        while piece := stream.read(CHECK_BYTES):
            value = zlib.crc32(piece, value)
    return value
