"""Checks that all readers share: a record is what its format says, or a ``RecordError`` names reason and detail."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from lcl_megatron.data.document import Document, ImageKind, ImageSegment, Reject, Source, TextSegment
from lcl_megatron.data.image_stores.image_folder import ImageFileError, check_name


class RecordError(ValueError):
    """A record that is no document; carries the reason and the detail of its reject."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        """One of few fixed phrases."""
        self.detail = detail
        """What was found."""


def decode(raw: bytes, where: str) -> str:
    """Return the text of UTF-8 bytes.

    Raises:
        RecordError: ``not UTF-8``.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", f"{where}: {error.reason} at {error.start}") from error


def parse_json(text: str) -> Any:
    """Return a JSON value; ``NaN`` and ``Infinity`` are not JSON.

    Raises:
        RecordError: ``malformed JSON``.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RecordError("malformed JSON", str(error)[:200]) from error


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object that a line holds.

    Raises:
        RecordError: ``not UTF-8``, ``malformed JSON``, ``wrong type``.
    """
    record = parse_json(decode(raw, "the record"))
    if not isinstance(record, dict):
        raise RecordError("wrong type", f"the record is {kind_name(record)}; expected an object")
    return record


def get_field(record: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str = "") -> Any:
    """Return a field of a record; ``where`` says which part of the record it is, empty = the record itself.

    Raises:
        RecordError: ``missing field``, or ``wrong type`` if it is not of ``kind`` (a boolean is no number).
    """
    if key not in record:
        raise RecordError("missing field", f"{where or 'the record'} has no {key}")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RecordError("wrong type", f"{where}{'.' if where else ''}{key} is {kind_name(value)}")
    return value


def get_text(record: dict[str, Any], key: str, where: str = "") -> str:
    """Return a string field that UTF-8 can hold; raises as ``get_field``, and ``not UTF-8``."""
    text: str = get_field(record, key, str, where)
    return check_utf8(text, f"{where}{'.' if where else ''}{key}")


def get_similarity(record: dict[str, Any], key: str, where: str = "") -> float:
    """Return a finite number; raises as ``get_field``."""
    try:
        similarity = float(get_field(record, key, (int, float), where))
    except OverflowError:
        similarity = math.inf
    if not math.isfinite(similarity):
        raise RecordError("wrong type", f"{where}{'.' if where else ''}{key} is {similarity}; expected a finite number")
    return similarity


def check_utf8(text: str, where: str) -> str:
    """Return the text if UTF-8 can hold it: JSON may spell lone surrogates.

    Raises:
        RecordError: ``not UTF-8``.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("not UTF-8", f"{where}: {error.reason} at {error.start}") from error
    return text


def kind_name(value: Any) -> str:
    """Return what a JSON value is called in messages."""
    return "null" if value is None else type(value).__name__


def assemble(
    segments: Sequence[TextSegment], images: Sequence[ImageSegment], source: Source
) -> Iterator[Document | Reject]:
    """Yield a document, and before it a reject for every image whose name could lead out of an image folder.

    Images may come in any order; those of one segment keep theirs. A document without usable images is a reject.
    """
    usable = []
    for image in images:
        try:
            check_name(image.name)
            usable.append(image)
        except ImageFileError as error:
            yield Reject(source, error.reason, error.detail, image.number, image.name)
    if usable:
        yield Document(tuple(segments), tuple(sorted(usable, key=lambda image: image.segment_index)), source)
    else:
        yield Reject(source, "no images", f"{len(images)} in the record, none usable" if images else "")


def assemble_pair(name: str, caption: str, similarity: float, source: Source) -> Iterator[Document | Reject]:
    """Yield the document of one image and its caption, or what is wrong with them.

    White space around the caption is removed. An image that is matched to an empty caption teaches nothing.
    """
    try:
        text = check_utf8(caption, "the caption").strip()
    except RecordError as error:
        yield Reject(source, error.reason, error.detail)
        return
    if text:
        yield from assemble([TextSegment(text)], [ImageSegment(name, 0, 0, similarity, ImageKind.MATCHED)], source)
    else:
        yield Reject(source, "no caption", f"of {name[:200]!a}")


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
