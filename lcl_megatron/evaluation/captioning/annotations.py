"""Test sets of captioning: images with ids and what people wrote about them.

::

    {"images": [{"filepath": "val2014", "filename": "7.jpg", "cocoid": 7, "split": "test",
                 "sentences": [{"raw": "A cat."}]}]}                              dataset_coco.json (Karpathy)
    [{"image": "val2014/7.jpg", "image_id": 7, "caption": ["A cat."]}]            coco_karpathy_test.json (LAVIS, BLIP)
    {"images": [{"id": 7, "file_name": "7.jpg", "domain": "near-domain"}],
     "annotations": [{"image_id": 7, "caption": "A cat."}]}                       captions_val2014.json, NoCaps

Captions are read as those of every test set are (``transfer/caption_sets.py``); this adds what predictions need: ids.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lcl_megatron.data.readers.records import RecordError, get_field, get_text, kind_name, parse_json
from lcl_megatron.evaluation.transfer.caption_sets import read_captions
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
        DataError: the file is missing, an image has no caption or no id, or comes twice; see ``read_captions``.
        ConfigError, OSError: see there.
    """
    if path.suffix != ".json":
        raise DataError(f"{path} is no .json file; captions are predicted for images with ids, which others lack")
    captions = read_captions(path, split)
    try:
        images = list(_images(parse_json(path.read_bytes().decode("utf-8-sig")), captions))
    except RecordError as error:
        raise DataError(f"{path}: {error.reason}: {error.detail}; repair the file or give another one") from error
    for names in ([image.image_id for image in images], [image.name for image in images]):
        ((name, count),) = Counter(names).most_common(1)
        if count > 1:
            raise DataError(f"{path}: image {name} comes twice; every image has one entry and one prediction")
    return images


def _images(value: Any, captions: Mapping[str, tuple[str, ...]]) -> Iterator[CaptionedImage]:
    """Yield those images of a file that have captions; the others are of another split."""
    is_list = isinstance(value, list)
    for number, entry in enumerate(value if is_list else value["images"]):
        where = f"entry {number}" if is_list else f"images[{number}]"
        if not isinstance(entry, dict):
            raise RecordError("wrong type", f"{where} is {kind_name(entry)}; expected an object")
        form = _COCO if not is_list and "annotations" in value else _KARPATHY if "sentences" in entry else _LIST
        name = form.name(entry, where)
        if name in captions:
            domain = str(entry.get("domain") or "")
            yield CaptionedImage(form.identity(entry, where), name, captions[name], domain)


def _karpathy_name(entry: dict[str, Any], where: str) -> str:
    name, folder = get_text(entry, "filename", where), str(entry.get("filepath") or "")
    return f"{folder}/{name}" if folder else name


def _listed_identity(entry: dict[str, Any], where: str) -> Any:
    """Return what an entry says, or the id in its file name, as COCO has it: COCO_val2014_000000391895.jpg."""
    if "image_id" in entry:
        return get_field(entry, "image_id", (int, str), where)
    digits = re.search(r"(\d+)$", PurePosixPath(entry["image"]).stem)
    if digits is None:
        raise RecordError("missing field", f"{where} has no image_id, and {entry['image']} does not end in a number")
    return int(digits.group(1))


class _Form(NamedTuple):
    """Where an entry, which messages call by the second argument, has its image's name and id."""

    name: Callable[[dict[str, Any], str], str]
    identity: Callable[[dict[str, Any], str], Any]


_COCO = _Form(
    lambda entry, where: get_text(entry, "file_name", where),
    lambda entry, where: get_field(entry, "id", (int, str), where),
)
_KARPATHY = _Form(
    _karpathy_name,
    lambda entry, where: get_field(entry, "cocoid" if "cocoid" in entry else "imgid", int, where),
)
_LIST = _Form(lambda entry, where: get_text(entry, "image", where), _listed_identity)
