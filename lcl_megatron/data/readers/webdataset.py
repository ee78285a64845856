"""Tars of image-caption pairs, as img2dataset writes them (LAION, CC12M, DataComp, ...) and webdataset reads them.

A sample is the members ``KEY.jpg`` (or jpeg, png, webp, gif), ``KEY.txt`` and ``KEY.json``, in any order and one
behind the other; the key is the name up to the first dot of its last part. The caption is ``KEY.txt``, or else field
``caption`` of ``KEY.json``, whose field ``similarity`` is the CLIP similarity. Other members are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcl_megatron.data.document import Document, ImageKind, ImageSegment, Reject, Source, TextSegment
from lcl_megatron.data.image_stores.image_folder import ImageFileError, check_name, check_size
from lcl_megatron.data.image_stores.tar_members import (
    IMAGE_EXTENSIONS,
    MAX_TEXT_BYTES,
    TEXT_EXTENSIONS,
    TarMember,
    split_name,
    tar_members,
)
from lcl_megatron.data.readers.records import (
    RecordError,
    decode,
    get_similarity,
    get_text,
    parse_object,
)

MAX_IMAGE_BYTES = 256 << 20
"""Larger images are not read into memory, whatever ``max_image_bytes`` of a run says."""


def read_webdataset(shard: Path, name: str = "") -> Iterator[Document | Reject]:
    """Yield the samples of a shard in order, and a reject for everything that is left out.

    Every document has one text and one image with its bytes. Members are read, never extracted; links, devices and
    names that lead anywhere are rejected. Captions are stripped of surrounding white space. The line of a source is
    the sample's number, from 1. One sample is held in memory at a time.

    Args:
        shard: ``.tar``, ``.tar.gz`` or ``.tgz`` file.
        name: What the shard is called in messages and in the corpus; empty = its file name.

    Raises:
        OSError: If the shard cannot be read, is damaged, or was cut short.
    """
    number = 0
    sample: _Sample | None = None
    for member in tar_members(shard):
        key, extension = split_name(member.name)
        if not extension:
            # A file of no sample, such as macOS's ._0001.jpg beside 0001.jpg, does not end the sample around it.
            number += 1
            yield Reject(Source(name or shard.name, number), "no sample", f"{key!a} has no key and extension")
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield from sample.finish()
            number += 1
            sample = _Sample(key, Source(name or shard.name, number))
        sample.add(member, extension)
    if sample is not None:
        yield from sample.finish()


@dataclass
class _Sample:
    """The members of one key, as far as they have been met."""

    key: str
    source: Source
    image_name: str = ""
    image: bytes | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    image_problem: ImageFileError | None = None
    problem: RecordError | None = None

    def add(self, member: TarMember, extension: str) -> None:
        """Read a member if it is of use; what is wrong with it is told when the sample is complete."""
        try:
            if extension in IMAGE_EXTENSIONS:
                self._add_image(member)
            elif extension in TEXT_EXTENSIONS:
                self._add_text(member, extension)
        except RecordError as error:
            self.problem = self.problem or error

    def finish(self) -> Iterator[Document | Reject]:
        """Yield the document, or what is wrong."""
        try:
            document = self._document()
        except RecordError as error:
            if self.image_problem is not None:
                reason, detail = self.image_problem.reason, self.image_problem.detail
                yield Reject(self.source, reason, detail, 0, self.image_name)
            yield Reject(self.source, error.reason, error.detail)
        else:
            yield document

    def _add_image(self, member: TarMember) -> None:
        if self.image_name:
            raise RecordError("several images", f"{self.image_name!a} and {member.name!a}")
        self.image_name = member.name
        try:
            check_name(member.name)
            if member.problem:
                raise ImageFileError("unreadable file", member.problem)
            check_size(member.size, MAX_IMAGE_BYTES)
            self.image = member.read()
        except ImageFileError as error:
            self.image_problem = error

    def _add_text(self, member: TarMember, extension: str) -> None:
        if extension in self.texts:
            raise RecordError("several texts", f"{member.name!a} comes twice")
        if member.problem:
            raise RecordError("unreadable file", f"{member.name!a} is {member.problem}")
        if member.size > MAX_TEXT_BYTES:
            raise RecordError("file too large", f"{member.name!a}: {member.size} bytes; at most {MAX_TEXT_BYTES}")
        self.texts[extension] = member.read()

    def _document(self) -> Document:
        """Return the document; raises ``RecordError``."""
        if self.problem is not None:
            raise self.problem
        if self.image is None:
            raise RecordError("no images", f"sample {self.key!a} has no readable image")
        record: dict[str, Any] = parse_object(self.texts["json"]) if "json" in self.texts else {}
        if "txt" in self.texts:
            caption = decode(self.texts["txt"], "the caption").strip()
        else:
            caption = get_text(record, "caption").strip() if record.get("caption") is not None else ""
        if not caption:
            raise RecordError("no caption", f"of {self.image_name!a}")
        # img2dataset writes null where its input has no value.
        similarity = get_similarity(record, "similarity") if record.get("similarity") is not None else 1.0
        image = ImageSegment(self.image_name, 0, 0, similarity, ImageKind.MATCHED, self.image)
        return Document((TextSegment(caption),), (image,), self.source)
