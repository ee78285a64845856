"""One input shard, encoded: the piece of a corpus that one worker writes.

A part is a folder of plain columns (``COLUMNS``, little-endian, no headers), ``rejects.jsonl`` and ``part.json``.
It is written under a name that no other process uses and renamed when complete, so a part that exists is whole, and a
writer that was given up but still runs can do no harm. Parts are appended to the corpus in the order of the inputs,
whichever worker finished first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lcl_megatron.data.document import ImageSegment, Reject, Source
from lcl_megatron.data.storage.corpus import IMAGE_ARRAYS
from lcl_megatron.data.storage.indexed_file import MAX_SEQUENCE_LENGTH

BLOBS: tuple[str, ...] = ("tokens.bin", "images.bin", "names.bin", "rejects.jsonl")
"""Files that stand in the corpus as they are: the parts' bytes, one behind the other."""
COLUMNS: dict[str, str] = {
    "segment_lengths": "int32",
    "document_segments": "int32",
    "document_images": "int32",
    "document_source": "int64",
    "image_lengths": "int32",
    "name_lengths": "int32",
    **IMAGE_ARRAYS,
}
"""Columns of a part and their dtypes; ``document_*`` hold counts per document (source: number of source, line)."""
TEMPORARY = ".tmp"
"""Ending of the folders that are not, or no longer, parts: whoever finds one without its writer may delete it."""
BUFFERED_VALUES = 1 << 15
"""Values of the columns that are held back, so that they are converted and written many at a time."""


@dataclass(frozen=True)
class StoredImage:
    """An image with its encoded bytes and its size."""

    segment: ImageSegment
    """Name and place in the document."""
    data: bytes
    """The encoded file."""
    width: int
    """Pixels; 0 if unknown."""
    height: int
    """Pixels; 0 if unknown."""
    source_hash: int | None = None
    """``image_hash`` of the source file's bytes; None = ``data`` are these bytes."""
    source_bytes: int | None = None
    """Size of the source file where ``data`` are a smaller version of it; None = ``data`` are its bytes."""


@dataclass(frozen=True)
class EncodedDocument:
    """A document as a corpus stores it."""

    segments: Sequence[Sequence[int]]
    """Token ids of each text segment, without special tokens; may be empty."""
    images: Sequence[StoredImage]
    """Images in order of their segments."""
    source: Source
    """Where the document comes from."""


@dataclass
class Totals:
    """What a part or a corpus holds, counted while it is written."""

    documents: int = 0
    """Documents kept."""
    segments: int = 0
    """Text segments."""
    images: int = 0
    """Images kept."""
    resized_images: int = 0
    """Images kept that were made smaller and encoded anew."""
    tokens: int = 0
    """Text tokens, without special tokens."""
    image_bytes: int = 0
    """Bytes of encoded images, as stored."""
    source_image_bytes: int = 0
    """Bytes of the same images in their source files."""
    min_token: int = 0
    """Smallest token id; 0 if there is none."""
    max_token: int = 0
    """Largest token id; 0 if there is none."""
    document_lengths: Counter[str] = field(default_factory=Counter)
    """Documents by text tokens: key ``2^k`` counts lengths above 2^(k-1) up to 2^k; key 0 counts empty ones."""
    document_images: Counter[str] = field(default_factory=Counter)
    """Documents by number of images."""
    rejected_documents: Counter[str] = field(default_factory=Counter)
    """Documents left out, by reason."""
    rejected_images: Counter[str] = field(default_factory=Counter)
    """Images left out, by reason."""

    def add_document(self, document: EncodedDocument, tokens: np.ndarray) -> None:
        """Count a document; ``tokens`` are those of all its segments."""
        length = len(tokens)
        if length:
            low, high = int(tokens.min()), int(tokens.max())
            self.min_token = low if self.tokens == 0 else min(self.min_token, low)
            self.max_token = max(self.max_token, high)
        self.documents += 1
        self.segments += len(document.segments)
        self.images += len(document.images)
        self.tokens += length
        for image in document.images:
            size = len(image.data)
            self.image_bytes += size
            self.source_image_bytes += size if image.source_bytes is None else image.source_bytes
            self.resized_images += image.source_bytes is not None
        self.document_lengths[str(1 << (length - 1).bit_length()) if length else "0"] += 1
        self.document_images[str(len(document.images))] += 1

    def add_reject(self, reject: Reject) -> None:
        """Count a reject."""
        counter = self.rejected_documents if reject.image_number is None else self.rejected_images
        counter[reject.reason] += 1

    def add(self, other: Totals) -> None:
        """Add the counts of a part."""
        if other.tokens:
            self.min_token = other.min_token if self.tokens == 0 else min(self.min_token, other.min_token)
            self.max_token = max(self.max_token, other.max_token)
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            elif name not in ("min_token", "max_token"):
                setattr(self, name, getattr(self, name) + value)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Totals:
        """Build from JSON."""
        parsed: dict[str, Any] = {
            key: Counter(value) if isinstance(value, dict) else value for key, value in values.items()
        }
        return cls(**parsed)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype of stored token ids; megatron-core chooses by the same rule."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def image_hash(data: bytes) -> int:
    """Return the first 8 bytes of the SHA-256 of an image's bytes, as a little-endian unsigned number."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")


class PartWriter:
    """Writes one part; use as a context manager. Leaving it by an exception leaves no part behind.

    Args:
        folder: The part to make. The folder that it lies in must exist.
        vocab_size: Token ids must be below it.
        source: The input that the part comes from: ``name``, ``bytes``, ... as it shall stand in the manifest.
    """

    def __init__(self, folder: Path, vocab_size: int, source: dict[str, Any]) -> None:
        self.totals = Totals()
        """Counts so far."""
        self._folder = folder
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._input = source
        self._sources: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}
        self._rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}

    def __enter__(self) -> PartWriter:
        self._staging = Path(
            tempfile.mkdtemp(suffix=TEMPORARY, prefix=f"{self._folder.name}.", dir=self._folder.parent)
        )
        self._files = {name: open(self._staging / name, "wb") for name in (*BLOBS, *COLUMNS)}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            # Closing writes what is buffered: a full disk is often met only here.
            with ExitStack() as files:
                for stream in self._files.values():
                    files.callback(stream.close)
                if kind is None:
                    self._write_rows()
                    part = {"input": self._input, "sources": list(self._sources), "totals": vars(self.totals)}
                    (self._staging / "part.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
            if kind is None:
                sync_folder(self._staging)
                self._finish()
        finally:
            # All that is left where there is no part; it would take the space that a full disk lacks.
            shutil.rmtree(self._staging, ignore_errors=True)

    def add(self, document: EncodedDocument) -> None:
        """Append a document.

        Raises:
            ValueError: If a token id is outside the vocabulary, or an image is larger than the format can say.
        """
        lengths = [len(segment) for segment in document.segments]
        tokens = np.array(list(itertools.chain.from_iterable(document.segments)), dtype=np.int64)
        self._check(document, tokens)
        self._files["tokens.bin"].write(tokens.astype(self._dtype).tobytes())
        rows = self._rows
        rows["segment_lengths"] += lengths
        rows["document_segments"].append(len(lengths))
        rows["document_images"].append(len(document.images))
        rows["document_source"] += (
            self._sources.setdefault(document.source.path, len(self._sources)),
            document.source.line,
        )
        for image in document.images:
            self._add_image(image)
        self.totals.add_document(document, tokens)
        if len(rows["segment_lengths"]) + len(rows["document_source"]) >= BUFFERED_VALUES:
            self._write_rows()

    def reject(self, reject: Reject) -> None:
        """Record something that was left out."""
        record: dict[str, Any] = {
            "file": reject.source.path,
            "line": reject.source.line,
            "reason": reject.reason,
            "detail": reject.detail,
        }
        if reject.image_number is not None:
            record |= {"image": reject.image_number, "image_name": reject.image_name}
        # ASCII: names from the web may hold lone surrogates, which UTF-8 cannot carry.
        self._files["rejects.jsonl"].write(json.dumps(record, ensure_ascii=True).encode("ascii") + b"\n")
        self.totals.add_reject(reject)

    def _add_image(self, image: StoredImage) -> None:
        rows, place, name = self._rows, image.segment, image.segment.name.encode("utf-8")
        self._files["images.bin"].write(image.data)
        self._files["names.bin"].write(name)
        rows["image_lengths"].append(len(image.data))
        rows["name_lengths"].append(len(name))
        rows["image_segment"].append(place.segment_index)
        rows["image_similarity"].append(place.similarity)
        rows["image_width"].append(image.width)
        rows["image_height"].append(image.height)
        rows["image_kind"].append(int(place.kind))
        rows["image_number"].append(place.number)
        rows["image_hash"].append(image_hash(image.data) if image.source_hash is None else image.source_hash)

    def _write_rows(self) -> None:
        for name, values in self._rows.items():
            self._files[name].write(np.asarray(values, dtype=COLUMNS[name]).tobytes())
            values.clear()

    def _finish(self) -> None:
        """Give the part its name, unless another writer of the same part was faster: its bytes are the same."""
        try:
            os.rename(self._staging, self._folder)
        except OSError:
            if not self._folder.is_dir():
                raise

    def _check(self, document: EncodedDocument, tokens: np.ndarray) -> None:
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < self._vocab_size):
            raise ValueError(
                f"{document.source}: token ids from {tokens.min()} to {tokens.max()}; the vocabulary "
                f"has {self._vocab_size}: the tokenizer and its vocabulary size do not fit"
            )
        for image in document.images:
            if not 0 < len(image.data) <= MAX_SEQUENCE_LENGTH:
                raise ValueError(
                    f"{document.source} image {image.segment.number} ({image.segment.name}): "
                    f"{len(image.data)} bytes; 1 to {MAX_SEQUENCE_LENGTH} can be stored"
                )


def remove_part(folder: Path) -> None:
    """Delete a part so that it is never there in pieces; one that is not there is no error."""
    doomed = folder.with_name(f"{folder.name}.appended{TEMPORARY}")
    try:
        os.rename(folder, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush all files of a folder, and its list of names, to the disk."""
    for path in (*sorted(folder.iterdir()), folder):
        sync(path)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
