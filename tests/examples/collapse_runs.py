"""A data folder and a preset of seconds for the experiment on the collapse of the encoder."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
EXPERIMENT = ROOT / "examples" / "experiments" / "collapse"
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
IMAGES = {"pretrain": 48, "probe_train": 30, "held_out": 30}
PRESET = """
[experiment]
images_seen = 480
pairs_images_seen = 600
images_per_step = 24
seeds = [1, 2]
documents = "told"
control_documents = "untold"
vocab_size = 320

[vision]
image_size = 16
patch_size = 8
num_layers = 1
hidden_size = 16
ffn_hidden_size = 32
num_attention_heads = 2
drop_path_rate = 0.0

[pool]
num_attention_heads = 2

[language]
num_layers = 1
hidden_size = 16
ffn_hidden_size = 32
num_attention_heads = 2
max_position_embeddings = 64

[data]
seq_length = 64
num_workers = 0

[training]
precision = "fp32"
transformer_impl = "torch"

[optimizer]
lr = 5e-3
lr_warmup_iters = 2

[logging]
log_interval = 4
"""


@dataclass
class Experiment:
    """A data folder, a preset, and an output folder that a command has filled."""

    data: Path
    preset: Path
    output: Path
    printed: str = ""

    def command(self, **changes: str) -> subprocess.CompletedProcess[str]:
        arguments = {"data": str(self.data), "preset": str(self.preset), "output": str(self.output)} | changes
        flags = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        return subprocess.run(
            [sys.executable, str(EXPERIMENT / "run.py"), *flags],
            cwd=self.data.parent,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def results(self) -> dict[str, Any]:
        return json.loads((self.output / "results.json").read_text())

    def run(self, name: str) -> dict[str, Any]:
        return json.loads((self.output / "runs" / name / "result.json").read_text())


def make_data(folder: Path) -> None:
    """Images of one colour, and documents that name it before (``told``) or only behind the image (``untold``)."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for split, count in IMAGES.items():
        for number in range(count):
            label = list(COLOURS)[number % 3]
            pixels = np.array(COLOURS[label]) + rng.normal(0, 20, (16, 16, 3))
            name = f"{split}_{number}.png"
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / "images" / name)
            rows.append((name, split, label))
    with open(folder / "labels.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([("image_name", "split", "label"), *rows])
    for style in ("told", "untold"):
        records = []
        for name, _, label in (row for row in rows if row[1] == "pretrain"):
            before = f"next comes {label} paint" if style == "told" else "next comes another one"
            texts = ["a page of paint", before, "here it is", f"that was {label} paint"]
            info = {"image_name": name, "matched_text_index": 2, "matched_sim": 0.3}
            records.append({"text_list": texts, "image_info": [info]})
        place = folder / "docs" / style / "data"
        place.mkdir(parents=True)
        with zipfile.ZipFile(place / "docs_shard_0_v2.jsonl.zip", "w") as archive:
            archive.writestr("docs_shard_0_v2.jsonl", "".join(json.dumps(record) + "\n" for record in records))
