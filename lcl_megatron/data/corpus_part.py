"""One input shard, encoded: the piece of a corpus that one worker writes.

A part is a folder of plain columns (``COLUMNS``, little-endian, no headers), ``rejects.jsonl`` and ``part.json``.
It is written under another name and renamed when complete, so a part that exists is whole. Parts are
appended to the corpus in the order of the inputs, whichever worker finished first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lcl_megatron.data.corpus import IMAGE_ARRAYS
from lcl_megatron.data.document import ImageSegment, Reject, Source
from lcl_megatron.data.indexed_file import MAX_SEQUENCE_LENGTH

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


@dataclass(frozen=True)
class StoredImage:
    """An image with its encoded bytes and the size that its header gives."""

    segment: ImageSegment
    """Name and place in the document."""
    data: bytes
    """The encoded file."""
    width: int
    """Pixels; 0 if unknown."""
    height: int
    """Pixels; 0 if unknown."""


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
    tokens: int = 0
    """Text tokens, without special tokens."""
    image_bytes: int = 0
    """Bytes of encoded images."""
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

    def add_document(self, document: EncodedDocument) -> None:
        """Count a document."""
        lengths = [len(segment) for segment in document.segments]
        tokens = [token for segment in document.segments for token in segment]
        if tokens:
            self.min_token = min(tokens) if self.tokens == 0 else min(self.min_token, min(tokens))
            self.max_token = max(self.max_token, max(tokens))
        self.documents += 1
        self.segments += len(lengths)
        self.images += len(document.images)
        self.tokens += len(tokens)
        self.image_bytes += sum(len(image.data) for image in document.images)
        self.document_lengths[str(1 << (len(tokens) - 1).bit_length()) if tokens else "0"] += 1
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
        for name in ("documents", "segments", "images", "tokens", "image_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("document_lengths", "document_images", "rejected_documents", "rejected_images"):
            getattr(self, name).update(getattr(other, name))

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


class PartWriter:
    """Writes one part; use as a context manager. Leaving it by an exception leaves no part behind.

    Args:
        folder: The part to make.
        vocab_size: Token ids must be below it.
        source: The input that the part comes from: ``name``, ``bytes``, ... as it shall stand in the manifest.
    """

    def __init__(self, folder: Path, vocab_size: int, source: dict[str, Any]) -> None:
        self.totals = Totals()
        """Counts so far."""
        self._folder = folder
        self._staging = folder.with_name(folder.name + ".tmp")
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._input = source
        self._sources: dict[str, int] = {}
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> PartWriter:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        self._files = {name: open(self._staging / name, "wb") for name in (*BLOBS, *COLUMNS)}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            part = {"input": self._input, "sources": list(self._sources), "totals": vars(self.totals)}
            (self._staging / "part.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
        for stream in self._files.values():
            stream.close()
        if kind is None:
            sync_folder(self._staging)
            os.rename(self._staging, self._folder)
        else:
            shutil.rmtree(self._staging, ignore_errors=True)

    def add(self, document: EncodedDocument) -> None:
        """Append a document.

        Raises:
            ValueError: If a token id is outside the vocabulary, or an image is larger than the format can say.
        """
        self._check(document)
        for segment in document.segments:
            self._files["tokens.bin"].write(np.asarray(segment, dtype=self._dtype).tobytes())
        names = [image.segment.name.encode("utf-8") for image in document.images]
        for image, name in zip(document.images, names, strict=True):
            self._files["images.bin"].write(image.data)
            self._files["names.bin"].write(name)
        places = [image.segment for image in document.images]
        source = self._sources.setdefault(document.source.path, len(self._sources))
        rows: dict[str, list[Any]] = {
            "segment_lengths": [len(segment) for segment in document.segments],
            "document_segments": [len(document.segments)],
            "document_images": [len(document.images)],
            "document_source": [source, document.source.line],
            "image_lengths": [len(image.data) for image in document.images],
            "name_lengths": [len(name) for name in names],
            "image_segment": [place.segment_index for place in places],
            "image_similarity": [place.similarity for place in places],
            "image_width": [image.width for image in document.images],
            "image_height": [image.height for image in document.images],
            "image_kind": [int(place.kind) for place in places],
            "image_number": [place.number for place in places],
        }
        for column, values in rows.items():
            self._files[column].write(np.asarray(values, dtype=COLUMNS[column]).tobytes())
        self.totals.add_document(document)

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

    def _check(self, document: EncodedDocument) -> None:
        for segment in document.segments:
            if len(segment) and not (0 <= min(segment) and max(segment) < self._vocab_size):
                raise ValueError(
                    f"{document.source}: token ids from {min(segment)} to {max(segment)}; the vocabulary "
                    f"has {self._vocab_size}: the tokenizer and its vocabulary size do not fit"
                )
        for image in document.images:
            if not 0 < len(image.data) <= MAX_SEQUENCE_LENGTH:
                raise ValueError(
                    f"{document.source} image {image.segment.number} ({image.segment.name}): "
                    f"{len(image.data)} bytes; 1 to {MAX_SEQUENCE_LENGTH} can be stored"
                )


def sync_folder(folder: Path) -> None:
    """Flush all files of a folder, and its list of names, to the disk."""
    for path in (*sorted(folder.iterdir()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
