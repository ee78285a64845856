"""Fixtures of the data tests: a small tokenizer, and MMC4 shards with images made on the spot."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcl_megatron.data.tokenizer import Tokenizer, train_tokenizer

SENTENCES = [
    f"{subject} {verb} {thing} {number} times."
    for subject in ("A cat", "The old dog", "My neighbour", "Nobody")
    for verb in ("sees", "paints", "forgets", "carries")
    for thing in ("a house", "the river", "two boats", "an apple")
    for number in range(3)
]


class Mmc4Folder:
    """An MMC4 data set under construction: shards of JSON lines and a folder of images."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images"
        self.images.mkdir(parents=True)

    def add_image(self, name: str, width: int = 12, height: int = 8, seed: int = 0) -> bytes:
        """Write a noise PNG and return its bytes."""
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        (self.images / name).write_bytes(buffer.getvalue())
        return buffer.getvalue()

    def add_shard(self, name: str, lines: Iterable[dict[str, Any] | bytes]) -> Path:
        """Write a shard of records or raw lines; its name decides between a zip of one member, gzip and plain."""
        raw = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
        path = self.path / name
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(path.stem, raw)
        elif path.suffix == ".gz":
            path.write_bytes(gzip.compress(raw))
        else:
            path.write_bytes(raw)
        return path


def record(texts: list[str], images: list[tuple[str, int, float]]) -> dict[str, Any]:
    """Return an MMC4 record; images are (name, matched_text_index, matched_sim)."""
    infos = [
        {"image_name": name, "matched_text_index": index, "matched_sim": similarity, "face_detections": None}
        for name, index, similarity in images
    ]
    return {"text_list": texts, "image_info": infos, "url": "https://example.org/"}


@pytest.fixture(name="record")
def record_fixture():
    return record


@pytest.fixture
def mmc4(tmp_path: Path) -> Mmc4Folder:
    return Mmc4Folder(tmp_path / "mmc4")


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(SENTENCES, path, 400)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_path)


@pytest.fixture
def shared_mmc4() -> Path:
    """A folder of real MMC4-layout documents outside the repository, if there is one."""
    root = Path(__file__).parents[2]
    shared = Path(os.environ.get("LCL_SHARED_DATA", root.parent / "shared" / "data"))
    folder = shared / "mini" / "real"
    if not folder.is_dir():
        pytest.skip(f"no real documents at {folder}; set LCL_SHARED_DATA to the folder that holds mini/real")
    return folder
