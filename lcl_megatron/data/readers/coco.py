"""Image-caption files in one JSON value: COCO annotations, and the lists that are called after A. Karpathy.

::

    {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": [{"image_id": 7, "caption": "A cat."}]}
    {"images": [{"filepath": "val2014", "filename": "7.jpg", "split": "train", "sentences": [{"raw": "A cat."}]}]}
    [{"image": "val2014/7.jpg", "caption": ["A cat.", "A small cat."]}]

Every pair of an image and a caption is a document. Chen et al., Microsoft COCO Captions, 2015 (arXiv 1504.00325);
Karpathy and Li, Deep Visual-Semantic Alignments, 2015 (arXiv 1412.2306).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, Reject, Source
from lcl_megatron.data.readers.records import (
    RecordError,
    assemble_pair,
    check_utf8,
    get_field,
    get_text,
    kind_name,
    parse_json,
)

Pair = tuple[str, str]
"""Image name and caption."""


def read_coco(shard: Path, name: str = "", splits: tuple[str, ...] = ()) -> Iterator[Document | Reject]:
    """Yield one document for every pair of a file, and a reject for everything that is left out.

    The line of a source is the number of the pair, from 1; an image without captions counts as one. COCO pairs come
    in the order of the annotations, then the images without any. The file is held in memory (some 10 times its size).

    Args:
        shard: ``.json`` file.
        name: What the shard is called in messages and in the corpus; empty = its file name.
        splits: Images whose field ``split`` is none of these are rejected; empty = all are taken.

    Raises:
        ConfigError: If the file has none of the three forms.
        OSError: If the file cannot be read, or is no JSON.
    """
    value = _load(shard)
    if isinstance(value, list):
        pairs = _list_pairs(value, splits)
    elif isinstance(value, dict) and isinstance(value.get("images"), list) and "annotations" in value:
        pairs = _annotation_pairs(shard, value)
    elif isinstance(value, dict) and isinstance(value.get("images"), list):
        pairs = _list_pairs(value["images"], splits)
    else:
        found = f"an object with {sorted(value)[:8]}" if isinstance(value, dict) else kind_name(value)
        raise ConfigError(
            f"{shard} holds {found}; expected COCO's images and annotations, or a list of images with their captions"
        )
    for number, pair in enumerate(pairs, start=1):
        source = Source(name or shard.name, number)
        if isinstance(pair, RecordError):
            yield Reject(source, pair.reason, pair.detail)
        else:
            yield from assemble_pair(*pair, 1.0, source)


def _load(shard: Path) -> Any:
    data = shard.read_bytes()
    try:
        return parse_json(data.decode("utf-8-sig"))
    except (RecordError, UnicodeDecodeError) as error:
        what = error.detail if isinstance(error, RecordError) else str(error)
        raise OSError(f"{shard} is not a JSON file ({what}); fetch it again or leave it out") from error


def _annotation_pairs(shard: Path, value: dict[str, Any]) -> Iterator[Pair | RecordError]:
    """Yield the pairs of a COCO file."""
    annotations = value["annotations"]
    if not isinstance(annotations, list):
        raise ConfigError(f"{shard}: annotations is {kind_name(annotations)}; expected a list")
    if annotations and not any(isinstance(entry, dict) and "caption" in entry for entry in annotations):
        raise ConfigError(f"{shard}: no annotation has a caption; give captions_*.json, not instances or keypoints")
    files: dict[str, set[str]] = {}
    for image in value["images"]:
        if isinstance(image, dict):
            found = files.setdefault(_key(image.get("id")), set())
            if isinstance(image.get("file_name"), str):
                found.add(image["file_name"])
    without = dict.fromkeys(files)
    for number, entry in enumerate(annotations):
        try:
            yield _annotation(entry, f"annotations[{number}]", files)
        except RecordError as error:
            yield error
        if isinstance(entry, dict):
            without.pop(_key(entry.get("image_id")), None)
    for key in without:
        yield RecordError("no caption", f"image {key} has no annotation")


def _annotation(entry: Any, where: str, files: dict[str, set[str]]) -> Pair:
    if not isinstance(entry, dict):
        raise RecordError("wrong type", f"{where} is {kind_name(entry)}; expected an object")
    key = _key(get_field(entry, "image_id", (int, str), where))
    caption = get_text(entry, "caption", where)
    found = files.get(key, set())
    if len(found) != 1:
        what = f"{len(found)} files" if found else "no file_name"
        raise RecordError("no images", f"{where}.image_id is {key}, which has {what} in images")
    return check_utf8(next(iter(found)), f"file_name of image {key}"), caption


def _list_pairs(entries: list[Any], splits: tuple[str, ...]) -> Iterator[Pair | RecordError]:
    """Yield the pairs of a list of images with their captions."""
    for number, entry in enumerate(entries):
        try:
            name, captions = _entry(entry, f"entry {number}", splits)
        except RecordError as error:
            yield error
            continue
        for caption in captions:
            if isinstance(caption, str):
                yield name, caption
            else:
                yield RecordError("wrong type", f"a caption of entry {number} is {kind_name(caption)}")
        if not captions:
            yield RecordError("no caption", f"of {name!a}")


def _entry(entry: Any, where: str, splits: tuple[str, ...]) -> tuple[str, list[Any]]:
    """Return image name and captions of an entry of either list."""
    if not isinstance(entry, dict):
        raise RecordError("wrong type", f"{where} is {kind_name(entry)}; expected an object")
    if splits and entry.get("split") not in splits:
        raise RecordError("other split", f"{where} is of split {entry.get('split')!r}; read are {', '.join(splits)}")
    if "sentences" in entry:
        name = get_text(entry, "filename", where)
        if entry.get("filepath"):
            name = f"{get_text(entry, 'filepath', where)}/{name}"
        sentences = get_field(entry, "sentences", list, where)
        return name, [item.get("raw") if isinstance(item, dict) else item for item in sentences]
    captions = get_field(entry, "caption", (list, str), where)
    return get_text(entry, "image", where), [captions] if isinstance(captions, str) else captions


def _key(identity: Any) -> str:
    """Return an image's id in a form that can be looked up: 7 and "7" are not the same, and a list is no surprise."""
    return json.dumps(identity)
