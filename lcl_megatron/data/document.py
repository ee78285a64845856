"""What a reader yields: documents of text segments and images, and rejects, each with its source.

A document says what stands where in the raw data. It knows nothing of placement, image choice, similarity
threshold or sequence length: those are decided anew, per epoch, when a row is composed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ImageKind(IntEnum):
    """How an image relates to the text segment that it names."""

    MATCHED = 0
    """Belongs to its segment and may be placed before or after it (MMC4)."""
    INLINE = 1
    """Stands exactly before its segment; behind the last one if the index is the number of segments (OBELICS)."""


@dataclass(frozen=True)
class Source:
    """Where a record comes from; prints as ``docs_shard_7.jsonl:1312``."""

    path: str
    """File as it is called in messages: relative to the common folder of all inputs, zip member instead of zip."""
    line: int
    """Line, from 1."""

    def __str__(self) -> str:
        """Return file and line."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class TextSegment:
    """A piece of text that is never cut: a sentence (MMC4) or a paragraph. May be empty."""

    text: str
    """The text, without special tokens."""


@dataclass(frozen=True)
class ImageSegment:
    """An image of a document, by name; unless the record brings its bytes, they are read when a corpus is written."""

    name: str
    """What the image store knows it by: a path below the image folder, or a URL."""
    number: int
    """Index in the source record, from 0; names the image in messages."""
    segment_index: int
    """Index of the text segment that it belongs to (see ``ImageKind``)."""
    similarity: float
    """CLIP similarity of image and segment; 1.0 where the source gives none."""
    kind: ImageKind
    """How it relates to the segment."""
    data: bytes | None = None
    """Encoded bytes, where the record brings them itself (tar samples); None = the image store has them."""


@dataclass(frozen=True)
class Document:
    """An interleaved document.

    Raises:
        ValueError: If an image names a segment that does not exist, or images are not in order of their segments.
    """

    segments: tuple[TextSegment, ...]
    """Text segments, in order."""
    images: tuple[ImageSegment, ...]
    """Images, in order of ``segment_index``."""
    source: Source
    """Where the document comes from."""

    def __post_init__(self) -> None:
        previous = 0
        for image in self.images:
            last = len(self.segments) - (image.kind is ImageKind.MATCHED)
            if not previous <= image.segment_index <= last:
                raise ValueError(
                    f"{self.source} image {image.number} ({image.name}): segment {image.segment_index}; expected "
                    f"{previous} to {last}: images are sorted by segment, and there are {len(self.segments)} segments"
                )
            previous = image.segment_index


@dataclass(frozen=True)
class Reject:
    """A document or an image that was left out, and why. Every input is a document, or a reject: nothing is dropped."""

    source: Source
    """The record."""
    reason: str
    """One of few fixed phrases, so that rejects can be counted by reason."""
    detail: str = ""
    """What was found; free text."""
    image_number: int | None = None
    """Index of the image in its record; None = the whole document was left out."""
    image_name: str = ""
    """Name of the image as the record gives it."""

    def __str__(self) -> str:
        """Return source, image if any, reason and detail."""
        image = "" if self.image_number is None else f" image {self.image_number} ({self.image_name})"
        return f"{self.source}{image}: {self.reason}" + (f": {self.detail}" if self.detail else "")
