"""The plain interleaved format: JSON lines, one document per line, with text and images in reading order.

::

    {"items": [{"text": "We left at dawn."}, {"image": "a/1.jpg"}, {"text": "The bridge was closed."}]}
    {"items": [{"text": "A cat."}, {"text": "Rain."}, {"image": "2.jpg", "matched_text_index": 0, "similarity": 0.31}]}

An image stands where it stands, exactly before the text that follows it; one with ``matched_text_index`` belongs to
that text (counted among the texts, from 0) and is placed before or after it, wherever it stands in the list.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcl_megatron.data.document import Document, ImageKind, ImageSegment, Reject, TextSegment
from lcl_megatron.data.readers.lines import read_documents
from lcl_megatron.data.readers.records import (
    RecordError,
    get_field,
    get_similarity,
    get_text,
    kind_name,
    parse_object,
)

IMAGE_FIELDS = {"image", "similarity", "matched_text_index"}
TEXT_FIELDS = {"text"}


def read_jsonl(shard: Path, name: str = "") -> Iterator[Document | Reject]:
    """Yield the documents of a shard in order, and a reject for everything that is left out.

    Fields beside ``items`` are ignored; an unknown field of an item is an error, because a misspelt
    ``matched_text_index`` would silently place the image elsewhere. Texts are stripped of surrounding white space.

    Args:
        shard: ``.jsonl`` file, ``.jsonl.gz``, or ``.zip`` of such files.
        name: What the shard is called in messages and in the corpus; empty = its file name.

    Raises:
        OSError: If the shard cannot be read, or is a damaged zip or gzip file.
    """
    return read_documents(shard, name, _parse)


def _parse(raw: bytes) -> tuple[list[TextSegment], list[ImageSegment]]:
    """Return text segments and images of one line; raises ``RecordError``."""
    segments: list[TextSegment] = []
    images: list[ImageSegment] = []
    matched: list[str] = []
    for number, item in enumerate(get_field(parse_object(raw), "items", list)):
        where = f"items[{number}]"
        if not isinstance(item, dict):
            raise RecordError("wrong type", f"{where} is {kind_name(item)}; expected an object")
        if ("text" in item) == ("image" in item):
            raise RecordError("inconsistent record", f"{where} has {sorted(item)}; expected one of text and image")
        unknown = sorted(item.keys() - (TEXT_FIELDS if "text" in item else IMAGE_FIELDS))
        if unknown:
            raise RecordError("unknown field", f"{where}.{unknown[0]!a}")
        if "text" in item:
            segments.append(TextSegment(get_text(item, "text", where).strip()))
            continue
        images.append(_image(item, len(images), len(segments), where))
        matched.append(where if images[-1].kind is ImageKind.MATCHED else "")
    for image, where in zip(images, matched, strict=True):
        # Known only now: the text of a matched image may come after it.
        if where and not 0 <= image.segment_index < len(segments):
            detail = f"{where}.matched_text_index is {image.segment_index} of {len(segments)} texts"
            raise RecordError("index out of range", detail)
    return segments, images


def _image(item: dict[str, Any], number: int, place: int, where: str) -> ImageSegment:
    name = get_text(item, "image", where)
    similarity = get_similarity(item, "similarity", where) if "similarity" in item else 1.0
    if "matched_text_index" not in item:
        return ImageSegment(name, number, place, similarity, ImageKind.INLINE)
    index = get_field(item, "matched_text_index", int, where)
    return ImageSegment(name, number, index, similarity, ImageKind.MATCHED)
