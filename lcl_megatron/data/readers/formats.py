"""The upstream formats by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lcl_megatron.data.document import Document, Reject
from lcl_megatron.data.readers.coco import read_coco
from lcl_megatron.data.readers.jsonl import read_jsonl
from lcl_megatron.data.readers.mmc4 import read_mmc4
from lcl_megatron.data.readers.obelics import read_obelics
from lcl_megatron.data.readers.tsv import Layout, read_tsv
from lcl_megatron.data.readers.webdataset import read_webdataset


@dataclass(frozen=True)
class Format:
    """How shards of one format are read."""

    read: Callable[[Path, str], Iterator[Document | Reject]]
    """Yields documents and rejects of a shard in order; arguments: path, and what it is called in messages."""
    brings_images: bool
    """Whether the images lie inside the shards; else they are looked up in an image store."""
    suffixes: tuple[str, ...]
    """Endings of the file names."""


JSON_LINES = (".jsonl", ".jsonl.gz", ".zip")
TABLES = (".tsv", ".csv", ".txt", ".tsv.gz", ".csv.gz", ".txt.gz", ".zip")
TARS = (".tar", ".tar.gz", ".tgz")
FORMATS: dict[str, Format] = {
    "mmc4": Format(read_mmc4, brings_images=False, suffixes=JSON_LINES),
    "obelics": Format(read_obelics, brings_images=False, suffixes=(".parquet",)),
    "webdataset": Format(read_webdataset, brings_images=True, suffixes=TARS),
    "coco": Format(read_coco, brings_images=False, suffixes=(".json",)),
    "coco-train": Format(partial(read_coco, splits=("train", "restval")), brings_images=False, suffixes=(".json",)),
    "tsv": Format(read_tsv, brings_images=False, suffixes=TABLES),
    "tsv-image-caption": Format(
        partial(read_tsv, layout=Layout(image_first=True)), brings_images=False, suffixes=TABLES
    ),
    "tsv-caption-image": Format(
        partial(read_tsv, layout=Layout(image_first=False)), brings_images=False, suffixes=TABLES
    ),
    "jsonl": Format(read_jsonl, brings_images=False, suffixes=JSON_LINES),
}
"""Formats by the name that ``tools/preprocess_data.py --format`` takes."""
