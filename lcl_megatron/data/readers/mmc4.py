"""MMC4: JSON lines (plain or zipped), one document per line, with the images in one folder.

A record holds ``text_list`` (sentences) and ``image_info``, a list of ``image_name``, ``matched_text_index`` (the
sentence that the image was matched to) and ``matched_sim`` (their CLIP similarity); other fields are not read.
Zhu et al., Multimodal C4, 2023 (arXiv 2304.06939).
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from lcl_megatron.data.document import Document, ImageKind, ImageSegment, Reject, Source, TextSegment
from lcl_megatron.data.image_folder import ImageFileError, check_name

MAX_LINE_BYTES = 64 << 20
"""Longer lines are rejected instead of read: a document of MMC4 has a few kilobytes."""


class _RecordError(ValueError):
    """A record that is no document; carries the reason and the detail of its reject."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def read_mmc4(shard: Path, name: str = "") -> Iterator[Document | Reject]:
    """Yield the documents of a shard in order, and a reject for everything that is left out.

    A damaged line costs that line only. Texts are stripped of surrounding white space and keep their place when
    empty, because images refer to them by index. Images are neither opened nor looked for.

    Args:
        shard: ``.jsonl`` file, or ``.zip`` of such files.
        name: What the shard is called in messages and in the corpus; empty = its file name.

    Raises:
        OSError: If the shard cannot be read, or is a damaged zip.
    """
    for path, line, raw in _lines(shard, name or shard.name):
        source = Source(path, line)
        try:
            if raw is None:
                raise _RecordError("line too long", f"more than {MAX_LINE_BYTES} bytes")
            segments, images = _parse(raw, first=line == 1)
        except _RecordError as error:
            yield Reject(source, error.reason, error.detail)
            continue
        usable = []
        for image in images:
            try:
                check_name(image.name)
                usable.append(image)
            except ImageFileError as error:
                yield Reject(source, error.reason, error.detail, image.number, image.name)
        if usable:
            # MMC4 lists images in no particular order; a stable sort keeps the record's order within a sentence.
            yield Document(segments, tuple(sorted(usable, key=lambda image: image.segment_index)), source)
        else:
            yield Reject(source, "no images", f"{len(images)} in the record, none usable" if images else "")


def _lines(shard: Path, name: str) -> Iterator[tuple[str, int, bytes | None]]:
    """Yield file name, line number and bytes of every line that is not blank; None for a line that is too long."""
    with _members(shard, name) as members:
        for path, stream in members:
            with stream:
                line = 0
                while raw := stream.readline(MAX_LINE_BYTES + 1):
                    line += 1
                    if len(raw) > MAX_LINE_BYTES:
                        while raw and not raw.endswith(b"\n"):
                            raw = stream.readline(MAX_LINE_BYTES)
                        yield path, line, None
                    elif not raw.isspace():
                        yield path, line, raw


@contextmanager
def _members(shard: Path, name: str) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Open a shard: yields name and stream of the file itself, or of every file inside a zip."""
    if shard.suffix != ".zip":
        yield iter([(name, open(shard, "rb"))])
        return
    try:
        with zipfile.ZipFile(shard) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            folder = name.rpartition("/")[0]
            if len(members) == 1:
                names = [f"{folder}/{members[0].filename}".lstrip("/")]
            else:
                names = [f"{name}/{info.filename}" for info in members]
            # Members are read, never extracted: their names cannot place a file anywhere.
            yield ((path, archive.open(info)) for path, info in zip(names, members, strict=True))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise OSError(f"{shard} is a damaged zip file ({error}); fetch it again or leave it out") from error


def _parse(raw: bytes, first: bool) -> tuple[tuple[TextSegment, ...], list[ImageSegment]]:
    """Return text segments and images of one line; raises ``_RecordError``."""
    try:
        record = json.loads(raw.decode("utf-8-sig" if first else "utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _RecordError("not UTF-8", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _RecordError("malformed JSON", str(error)[:200]) from error
    if not isinstance(record, dict):
        raise _RecordError("wrong type", f"the record is {_kind(record)}; expected an object")
    texts = _field(record, "text_list", list, "the record")
    segments = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise _RecordError("wrong type", f"text_list[{index}] is {_kind(text)}; expected a string")
        segments.append(TextSegment(_utf8(text, f"text_list[{index}]").strip()))
    infos = _field(record, "image_info", list, "the record")
    return tuple(segments), [_image(info, index, len(texts)) for index, info in enumerate(infos)]


def _image(info: Any, number: int, num_segments: int) -> ImageSegment:
    where = f"image_info[{number}]"
    if not isinstance(info, dict):
        raise _RecordError("wrong type", f"{where} is {_kind(info)}; expected an object")
    name = _utf8(_field(info, "image_name", str, where), f"{where}.image_name")
    index = _field(info, "matched_text_index", int, where)
    try:
        similarity = float(_field(info, "matched_sim", (int, float), where))
    except OverflowError:
        similarity = math.inf
    if not 0 <= index < num_segments:
        raise _RecordError("index out of range", f"{where}.matched_text_index is {index} of {num_segments} texts")
    if not math.isfinite(similarity):
        raise _RecordError("wrong type", f"{where}.matched_sim is {similarity}; expected a finite number")
    return ImageSegment(name, number, index, similarity, ImageKind.MATCHED)


def _field(record: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if key not in record:
        raise _RecordError("missing field", f"{where} has no {key}")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _RecordError("wrong type", f"{where}.{key} is {_kind(value)}".replace("the record.", ""))
    return value


def _utf8(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RecordError("not UTF-8", f"{where}: {error.reason} at {error.start}") from error
    return text


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
