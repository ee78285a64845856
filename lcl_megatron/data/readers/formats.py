"""The upstream formats by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lcl_megatron.data.document import Document, Reject
from lcl_megatron.data.readers.mmc4 import read_mmc4


@dataclass(frozen=True)
class Format:
    """How shards of one format are read."""

    read: Callable[[Path, str], Iterator[Document | Reject]]
    """Yields documents and rejects of a shard in order; arguments: path, and what it is called in messages."""
    brings_images: bool
    """Whether the images lie inside the shards; else they are looked up in an image store."""
    suffixes: tuple[str, ...]
    """Endings of the file names."""


FORMATS: dict[str, Format] = {
    "mmc4": Format(read_mmc4, brings_images=False, suffixes=(".jsonl", ".zip")),
}
"""Formats by the name that ``tools/preprocess_data.py --format`` takes."""
