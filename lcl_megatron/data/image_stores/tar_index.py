"""Where in which tar an image lies: an index by hash, built once, sorted on disk and memory-mapped by all processes.

An index is a folder that appears in one rename and never changes::

    manifest.json   version, number of entries, and name, size and modification time of every tar
    keys.bin        (entries,) uint64, ascending: first half of the hash of a name or URL
    places.bin      (entries,) PLACE: the other half, the tar, and where in it the image lies

An image is found by its member name and, where the tar has a record ``KEY.json`` with a ``url`` as img2dataset writes
it, by its URL. An entry takes 32 bytes; while an index is built, one 256th of it is held in memory at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lcl_megatron.data.image_stores.image_folder import ImageFileError, check_name, is_url
from lcl_megatron.data.image_stores.tar_members import (
    IMAGE_EXTENSIONS,
    MAX_TEXT_BYTES,
    TEXT_EXTENSIONS,
    split_name,
    tar_members,
)
from lcl_megatron.data.storage.indexed_file import map_array

VERSION = 1
PLACE = np.dtype([("low", "<u8"), ("offset", "<i8"), ("size", "<u4"), ("tar", "<u4")])
"""One image: second half of its hash, first byte and number of bytes in the tar, number of the tar."""
ENTRY = np.dtype([("high", "<u8"), *((name, PLACE[name]) for name in PLACE.names or ())])
"""A key and its place, as they stand in the unsorted buckets of an index that is built."""
BUCKETS = 256
CHUNK_ENTRIES = 1 << 16
"""Entries that are held as Python objects at one time."""
MAX_MEMBER_BYTES = 2**32 - 1
OWN_FOLDER = re.compile(r"(pieces-)?[0-9a-f]{16}|building-.*")
"""Names of the folders that are made here: of all others, none is ever deleted."""


@dataclass(frozen=True)
class TarPlace:
    """Where the bytes of an image lie."""

    tar: int
    """Number of the tar."""
    offset: int
    """First byte."""
    size: int
    """Number of bytes."""


class TarIndex:
    """Finds images in tars; cheap to open.

    Args:
        folder: A folder that ``open_tar_index`` wrote.
    """

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.entries: int = manifest["entries"]
        """Number of names and URLs."""
        self._keys = map_array(folder / "keys.bin", "<u8", 0, self.entries)
        self._places = np.memmap(folder / "places.bin", PLACE, "r") if self.entries else np.zeros(0, PLACE)

    def find(self, name: str) -> list[TarPlace]:
        """Return the places of a member name or URL, in the order of the tars and of their members."""
        high, low = hash_name(name)
        first = int(np.searchsorted(self._keys, np.uint64(high)))
        places = []
        while first < self.entries and int(self._keys[first]) == high:
            place = self._places[first]
            if int(place["low"]) == low:
                places.append(TarPlace(int(place["tar"]), int(place["offset"]), int(place["size"])))
            first += 1
        return places


def open_tar_index(tars: Sequence[Path], folder: Path) -> TarIndex:
    """Return the index of some tars, after building it if there is none or a tar has changed.

    Several processes may ask at the same time: they share the tars among them, and one joins the results. What was
    done before an interruption is not done again.

    Args:
        tars: Plain tar files.
        folder: Where indices of these tars are kept. If it cannot be written, the user's cache folder is used.

    Raises:
        OSError: If a tar cannot be read, or is damaged.
    """
    stats = [tar.stat() for tar in tars]
    listing = [[tar.name, stat.st_size, stat.st_mtime_ns] for tar, stat in zip(tars, stats, strict=True)]
    key = hashlib.sha256(json.dumps([VERSION, listing]).encode("utf-8")).hexdigest()[:16]
    if (folder / key).is_dir():
        return TarIndex(folder / key)
    folder = _writable(folder)
    index, pieces = folder / key, folder / f"pieces-{key}"
    try:
        if not index.is_dir():
            _write_pieces(tars, pieces)
            with _locked(folder / "lock"):
                if not index.is_dir():
                    _join_pieces(len(tars), pieces, index, {"version": VERSION, "tars": listing})
    except FileNotFoundError:
        # Another process has joined the pieces and tidied up.
        if not index.is_dir():
            raise
    return TarIndex(index)


def hash_name(name: str) -> tuple[int, int]:
    """Return the two 64-bit halves of the hash of a URL or member name; ``./a.jpg`` and ``a.jpg`` are one name."""
    text = f"url {name}" if is_url(name) else f"name {PurePosixPath(name).as_posix()}"
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _writable(folder: Path) -> Path:
    """Return ``folder`` after making it, or one in the user's cache if it cannot be made or written.

    A link is no such folder: it may have come with the data, and lead to where files are written and deleted.
    """
    try:
        folder.mkdir(exist_ok=True)
        if folder.is_symlink():
            raise OSError(f"{folder} is a symbolic link")
        open(folder / "lock", "ab").close()
    except OSError:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
        folder = cache / "lcl_megatron" / "tar_index" / name
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; yields whether it is held, which it always is after waiting."""
    with open(path, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held


def _write_pieces(tars: Sequence[Path], folder: Path) -> None:
    """Write the entries of every tar to a file of its own, together with all other processes that do the same."""
    folder.mkdir(exist_ok=True)
    # Every process begins elsewhere; the second round waits for the tars that others had in hand in the first.
    start = int.from_bytes(os.urandom(4), "little") % len(tars)
    for wait in (False, True):
        for number in (*range(start, len(tars)), *range(start)):
            piece = folder / f"{number:08d}"
            if piece.exists():
                continue
            with _locked(piece.with_suffix(".lock"), wait) as held:
                if held and not piece.exists():
                    _write_piece(tars[number], number, piece)


def _write_piece(tar: Path, number: int, piece: Path) -> None:
    temporary = piece.with_suffix(".tmp")
    # Never written through: what a killed process left, or a link that came with the data.
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as stream:
        entries = _entries(tar, number)
        while chunk := list(itertools.islice(entries, CHUNK_ENTRIES)):
            stream.write(np.array(chunk, dtype=ENTRY).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(temporary, piece)


def _join_pieces(count: int, pieces: Path, index: Path, manifest: dict[str, Any]) -> None:
    """Sort the entries of all tars into the folder ``index``, and delete the older folders of its kind beside it.

    Those are the pieces, what was left by processes that were killed, and indices of tars that have changed.
    """
    others = [path for path in index.parent.iterdir() if path.is_dir() and OWN_FOLDER.fullmatch(path.name)]
    staging = Path(tempfile.mkdtemp(prefix="building-", dir=index.parent))
    buckets = [open(staging / f"bucket{number}", "wb") for number in range(BUCKETS)]
    try:
        for number in range(count):
            with open(pieces / f"{number:08d}", "rb") as piece:
                while len(entries := np.fromfile(piece, ENTRY, CHUNK_ENTRIES)):
                    bucket_of = entries["high"] >> np.uint64(56)
                    for bucket in np.unique(bucket_of):
                        buckets[int(bucket)].write(entries[bucket_of == bucket].tobytes())
    finally:
        for bucket_stream in buckets:
            bucket_stream.close()
    total = 0
    with open(staging / "keys.bin", "wb") as keys, open(staging / "places.bin", "wb") as places:
        for number in range(BUCKETS):
            entries = np.fromfile(staging / f"bucket{number}", dtype=ENTRY)
            entries = entries[np.lexsort([entries[name] for name in ("offset", "tar", "low", "high")])]
            keys.write(entries["high"].tobytes())
            places.write(np.array(entries[list(PLACE.names or ())], dtype=PLACE).tobytes())
            total += len(entries)
            os.unlink(staging / f"bucket{number}")
        for stream in (keys, places):
            stream.flush()
            os.fsync(stream.fileno())
    (staging / "manifest.json").write_text(json.dumps(manifest | {"entries": total}), encoding="utf-8")
    os.rename(staging, index)
    for path in others:
        shutil.rmtree(path, ignore_errors=True)


def _entries(tar: Path, number: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield an ``ENTRY`` for every name and URL of the images in a tar.

    What cannot be an image of a record is left out: links, devices, unsafe names, texts, members of 4 GiB and more.
    """
    sample, image, url = "", None, None
    for member in tar_members(tar):
        key, extension = split_name(member.name)
        if key != sample:
            sample, image, url = key, None, None
        if member.problem or member.size > MAX_MEMBER_BYTES:
            continue
        if extension == "json" and member.size <= MAX_TEXT_BYTES:
            url = _url(member.read())
        elif extension not in TEXT_EXTENSIONS:
            try:
                check_name(member.name)
            except ImageFileError:
                continue
            high, low = hash_name(member.name)
            yield high, low, member.offset, member.size, number
            if extension in IMAGE_EXTENSIONS:
                image = image or member
        if image is not None and url is not None:
            high, low = hash_name(url)
            yield high, low, image.offset, image.size, number
            image, url = None, None


def _url(record: bytes) -> str | None:
    """Return the URL in a record of img2dataset; None if it has none that can be looked up."""
    try:
        fields = json.loads(record)
        url = fields.get("url") if isinstance(fields, dict) else None
        if isinstance(url, str) and is_url(url):
            check_name(url)
            return url
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or a URL that no name can be
        pass
    return None
