"""Predicted captions as a file that the COCO server and all evaluation tools take.

::

    [{"image_id": 7, "caption": "a cat on a mat"}]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lcl_megatron.evaluation.captioning.annotations import CaptionedImage
from lcl_megatron.evaluation.transfer.image_sets import DataError


def write_predictions(images: Sequence[CaptionedImage], captions: Sequence[str], path: Path) -> None:
    """Write the captions of images; the folder is made if it is missing."""
    records = [
        {"image_id": image.image_id, "caption": caption} for image, caption in zip(images, captions, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def read_predictions(path: Path, images: Sequence[CaptionedImage]) -> list[str]:
    """Return the captions of a file, in the order of the images.

    Raises:
        DataError: the file is missing or damaged, or has not exactly one caption for every image.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        captions = {record["image_id"]: str(record["caption"]) for record in records}
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}; give predictions that tools/evaluate.py wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} holds no list of {{"image_id", "caption"}} ({type(error).__name__}: {error})'
        ) from error
    wanted = {image.image_id for image in images}
    if captions.keys() != wanted or len(records) != len(images):
        missing, unknown = len(wanted - captions.keys()), len(captions.keys() - wanted)
        raise DataError(
            f"{path} has {len(records)} captions for {len(images)} images: {missing} images have none, {unknown} are "
            "not of this test set; give the predictions of this set"
        )
    return [captions[image.image_id] for image in images]
