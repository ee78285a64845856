"""MMC4: JSON lines, one document per line, with the images in one folder or in tars.

A record holds ``text_list`` (sentences) and ``image_info``, a list of ``image_name``, ``matched_text_index`` (the
sentence that the image was matched to) and ``matched_sim`` (their CLIP similarity); other fields are not read.
All sets have this form: full (``docs_shard_N_v2.jsonl.zip``), fewer faces (``docs_no_face_shard_N_v2.jsonl.zip``) and
core (``docs_no_face_shard_N_v3.jsonl``). Zhu et al., Multimodal C4, 2023 (arXiv 2304.06939).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcl_megatron.data.document import Document, ImageKind, ImageSegment, Reject, TextSegment
from lcl_megatron.data.readers.lines import read_documents
from lcl_megatron.data.readers.records import (
    RecordError,
    check_utf8,
    get_field,
    get_similarity,
    get_text,
    kind_name,
    parse_object,
)


def read_mmc4(shard: Path, name: str = "") -> Iterator[Document | Reject]:
    """Yield the documents of a shard in order, and a reject for everything that is left out.

    A damaged line costs that line only. Texts are stripped of surrounding white space and keep their place when
    empty, because images refer to them by index. MMC4 lists images in no particular order; documents have them in
    the order of their sentences. Images are neither opened nor looked for.

    Args:
        shard: ``.jsonl`` file, ``.jsonl.gz``, or ``.zip`` of such files.
        name: What the shard is called in messages and in the corpus; empty = its file name.

    Raises:
        OSError: If the shard cannot be read, or is a damaged zip or gzip file.
    """
    return read_documents(shard, name, _parse)


def _parse(raw: bytes) -> tuple[list[TextSegment], list[ImageSegment]]:
    """Return text segments and images of one line; raises ``RecordError``."""
    record = parse_object(raw)
    segments = []
    for index, text in enumerate(get_field(record, "text_list", list)):
        if not isinstance(text, str):
            raise RecordError("wrong type", f"text_list[{index}] is {kind_name(text)}; expected a string")
        segments.append(TextSegment(check_utf8(text, f"text_list[{index}]").strip()))
    infos = get_field(record, "image_info", list)
    return segments, [_image(info, index, len(segments)) for index, info in enumerate(infos)]


def _image(info: Any, number: int, num_segments: int) -> ImageSegment:
    where = f"image_info[{number}]"
    if not isinstance(info, dict):
        raise RecordError("wrong type", f"{where} is {kind_name(info)}; expected an object")
    name = get_text(info, "image_name", where)
    index = get_field(info, "matched_text_index", int, where)
    similarity = get_similarity(info, "matched_sim", where)
    if not 0 <= index < num_segments:
        raise RecordError("index out of range", f"{where}.matched_text_index is {index} of {num_segments} texts")
    return ImageSegment(name, number, index, similarity, ImageKind.MATCHED)
