"""Predicted captions as a file that the COCO server and all evaluation tools take.

::

    [{"image_id": 7, "caption": "a cat on a mat"}]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lcl_megatron.evaluation.captioning.annotations import CaptionedImage


def write_predictions(images: Sequence[CaptionedImage], captions: Sequence[str], path: Path) -> None:
    """Write the captions of images; the folder is made if it is missing."""
    records = [
        {"image_id": image.image_id, "caption": caption} for image, caption in zip(images, captions, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
