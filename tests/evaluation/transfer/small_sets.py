"""Small data sets for tests of transfer: images whose class is their colour, in every layout, and their captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 40, 200), "green": (40, 180, 60), "red": (210, 50, 40)}
SIZE = 16
ENCODER = "random:vit_tiny_patch16_224?img_size=16,patch_size=8,depth=1,embed_dim=32,num_heads=2"


def picture(colour: str, number: int) -> bytes:
    """Return a noisy PNG of a colour; every number gives another one."""
    random = np.random.default_rng([number, *COLOURS[colour]])
    pixels = np.array(COLOURS[colour]) + random.normal(0, 25, (SIZE, SIZE, 3))
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_folders(root: Path, split: str, per_class: int) -> None:
    """Write ``root/split/CLASS/*.png``."""
    for colour in COLOURS:
        folder = root / split / colour
        folder.mkdir(parents=True)
        for number in range(per_class):
            (folder / f"{split}{number}.png").write_bytes(picture(colour, number + 1000 * (split == "val")))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar of plain members."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_captioned(root: Path, count: int, split_at: int) -> Path:
    """Write ``root/images`` and a file like dataset_coco.json whose first images are of split ``train``; return it."""
    (root / "images" / "val2014").mkdir(parents=True)
    entries = []
    for number in range(count):
        colour = list(COLOURS)[number % 3]
        (root / "images" / "val2014" / f"{number}.png").write_bytes(picture(colour, number))
        sentences = [{"raw": f"a {colour} square"}, {"raw": f"this one is {colour}"}]
        entries.append(
            {
                "filepath": "val2014",
                "filename": f"{number}.png",
                "split": "train" if number < split_at else "test",
                "sentences": sentences,
            }
        )
    file = root / "dataset_coco.json"
    file.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return file
