"""Test sets of captioning: images with ids and what people wrote about them.

::

    {"images": [{"filepath": "val2014", "filename": "7.jpg", "cocoid": 7, "split": "test",
                 "sentences": [{"raw": "A cat."}]}]}                              dataset_coco.json (Karpathy)
    [{"image": "val2014/7.jpg", "image_id": 7, "caption": ["A cat."]}]            coco_karpathy_test.json (LAVIS, BLIP)
    {"images": [{"id": 7, "file_name": "7.jpg", "domain": "near-domain"}],
     "annotations": [{"image_id": 7, "caption": "A cat."}]}                       captions_val2014.json, NoCaps

Unlike the readers of training data, which leave out what is damaged, these refuse it: a score is of the whole set.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lcl_megatron.data.readers.records import RecordError, get_field, get_text, kind_name, parse_json
from lcl_megatron.evaluation.transfer.image_sets import DataError

ImageId = int | str


@dataclass(frozen=True)
class CaptionedImage:
    """An image of a test set."""

    image_id: ImageId
    """What the set calls it; prediction files repeat it."""
    name: str
    """File, relative to the image folder."""
    captions: tuple[str, ...]
    """References, at least one."""
    domain: str = ""
    """``in-domain``, ``near-domain`` or ``out-domain`` in NoCaps; else empty."""


def read_caption_test_set(path: Path, split: str = "test") -> list[CaptionedImage]:
    """Return the images of a test set, in the order of the file.

    Args:
        path: JSON file of one of the three forms.
        split: images to take where the file says of which split they are.

    Raises:
        DataError: the file is missing or damaged, an image has no caption or no id, or comes twice.
    """
    try:
        value = parse_json(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; give the annotation file of a caption test set") from error
    except (RecordError, UnicodeDecodeError) as error:
        detail = error.detail if isinstance(error, RecordError) else str(error)
        raise DataError(f"{path} is no JSON file ({detail}); fetch it again") from error
    try:
        images = list(_images(value, split))
    except RecordError as error:
        raise DataError(f"{path}: {error.reason}: {error.detail}; fetch the file again or give another one") from error
    _check(images, path, split)
    return images


def _images(value: Any, split: str) -> Iterator[CaptionedImage]:
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield _listed(entry, f"entry {number}")
    elif isinstance(value, dict) and "annotations" in value:
        yield from _annotated(value)
    elif isinstance(value, dict) and "images" in value:
        for number, entry in enumerate(get_field(value, "images", list)):
            if isinstance(entry, dict) and entry.get("split") == split:
                yield _of_karpathy(entry, f"images[{number}]")
    else:
        raise RecordError("wrong form", f"{kind_name(value)}; expected COCO annotations, or a list of images")


def _listed(entry: Any, where: str) -> CaptionedImage:
    if not isinstance(entry, dict):
        raise RecordError("wrong type", f"{where} is {kind_name(entry)}; expected an object")
    name = get_text(entry, "image", where)
    captions = get_field(entry, "caption", (list, str), where)
    identity = get_field(entry, "image_id", (int, str), where) if "image_id" in entry else _number_in(name, where)
    return CaptionedImage(identity, name, _texts([captions] if isinstance(captions, str) else captions, where))


def _number_in(name: str, where: str) -> int:
    """Return the id in a file name, as COCO has it: COCO_val2014_000000391895.jpg."""
    digits = re.search(r"(\d+)$", PurePosixPath(name).stem)
    if digits is None:
        raise RecordError("missing field", f"{where} has no image_id, and {name} does not end in a number")
    return int(digits.group(1))


def _of_karpathy(entry: dict[str, Any], where: str) -> CaptionedImage:
    name = get_text(entry, "filename", where)
    folder = str(entry.get("filepath") or "")
    sentences = get_field(entry, "sentences", list, where)
    texts = [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
    key = "cocoid" if "cocoid" in entry else "imgid"
    identity = get_field(entry, key, int, where)
    return CaptionedImage(identity, f"{folder}/{name}" if folder else name, _texts(texts, where))


def _annotated(value: dict[str, Any]) -> Iterator[CaptionedImage]:
    captions: dict[ImageId, list[Any]] = {}
    for number, entry in enumerate(get_field(value, "annotations", list)):
        where = f"annotations[{number}]"
        if not isinstance(entry, dict):
            raise RecordError("wrong type", f"{where} is {kind_name(entry)}; expected an object")
        captions.setdefault(get_field(entry, "image_id", (int, str), where), []).append(
            get_text(entry, "caption", where)
        )
    for number, entry in enumerate(get_field(value, "images", list)):
        where = f"images[{number}]"
        if not isinstance(entry, dict):
            raise RecordError("wrong type", f"{where} is {kind_name(entry)}; expected an object")
        identity = get_field(entry, "id", (int, str), where)
        texts = _texts(captions.pop(identity, []), where)
        yield CaptionedImage(identity, get_text(entry, "file_name", where), texts, str(entry.get("domain") or ""))
    if captions:
        raise RecordError("no images", f"captions of image {next(iter(captions))}, which is not in images")


def _texts(captions: list[Any], where: str) -> tuple[str, ...]:
    texts = tuple(caption for caption in captions if isinstance(caption, str) and caption.strip())
    if not texts or len(texts) != len(captions):
        raise RecordError("no caption", f"{where} has {len(texts)} captions in {len(captions)} entries")
    return texts


def _check(images: list[CaptionedImage], path: Path, split: str) -> None:
    if not images:
        raise DataError(f"{path} has no image of split {split!r}; give another split or file")
    seen: set[ImageId] = set()
    for image in images:
        if image.image_id in seen:
            raise DataError(f"{path}: image {image.image_id} comes twice; every image has one entry and one prediction")
        seen.add(image.image_id)
