"""Runs of preprocessing over small MMC4 shards, and what is compared of their results."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from tests.data.conftest import Mmc4Folder, record


def tree_hash(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def write_shards(mmc4: Mmc4Folder) -> list[Path]:
    """Five shards of uneven size; every third document has a missing image, one shard is empty."""
    paths = []
    for shard, count in enumerate([7, 1, 0, 12, 5]):
        lines: list[dict[str, Any] | bytes] = []
        for number in range(count):
            names = [f"{shard}_{number}_{index}.png" for index in range(1 + number % 3)]
            for index, name in enumerate(names):
                if number != 4 and (number + index) % 3 != 2:
                    mmc4.add_image(name, 8 + number, 9 + index, seed=shard * 100 + number)
            if number == 4:
                names = ["never_there.png"]
            texts = [f"A cat sees {number} things.", "", "The old dog paints <image>."]
            lines.append(record(texts, [(name, index % 3, 0.2 + index / 10) for index, name in enumerate(names)]))
        lines.insert(1, b"{broken")
        paths.append(mmc4.add_shard(f"docs_shard_{shard}_v2.jsonl" + (".zip" if shard % 2 else ""), lines))
    return paths


def config(
    mmc4: Mmc4Folder, shards: list[Path], tokenizer_path: Path, output: Path, **changes: Any
) -> PreprocessConfig:
    """A run over shards of a folder."""
    return PreprocessConfig(
        input=tuple(shards), image_root=mmc4.images, tokenizer_model=tokenizer_path, output=output, **changes
    )
