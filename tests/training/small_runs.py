"""Small runs for tests: an MMC4 folder made on the spot, the real preprocessing, a model of milliseconds."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcl_megatron.config import (
    CheckpointConfig,
    DataConfig,
    LanguageConfig,
    LoggingConfig,
    OptimizerConfig,
    PoolConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from lcl_megatron.data.preprocessing.preprocess import PreprocessConfig, PreprocessSummary, preprocess
from lcl_megatron.data.tokenizer import train_tokenizer
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from

IMAGE_SIZE = 16
NAMES = "ant bee cat dog elk fox gnu hen ibis jay kiwi lynx mole newt owl pug quail rat seal toad".split()
PLACES = "attic barn cave desert empty field garden hill island jungle kitchen lake mill".split()

Texts = Sequence[str]
Images = Sequence[tuple[str, int]]
"""Name, and index of the text that the image is matched to."""


def sentence(number: int) -> str:
    """A sentence that no other number below 260 has."""
    return f"the {NAMES[number % len(NAMES)]} lives in the {PLACES[number % len(PLACES)]} with {number} friends"


def picture(number: int) -> bytes:
    """A PNG of smooth colours that no other number has."""
    grid = np.random.default_rng([7, number]).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grid).resize((20, 20), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def memory_document(number: int) -> tuple[Texts, Images]:
    """First image, a sentence that only this image foretells, second image that only this sentence foretells.

    Both images are matched to empty sentences, so that their place is not drawn: every token is foretold.
    """
    return ("", sentence(number), ""), ((f"{number}a.png", 0), (f"{number}b.png", 2))


def redundant_document(number: int) -> tuple[Texts, Images]:
    """A sentence, an image, and the same sentence again: nobody has to look at the image to foretell the text."""
    return (sentence(number), "", sentence(number)), ((f"{number}a.png", 1),)


def plain_document(number: int) -> tuple[Texts, Images]:
    """Two images between sentences; the place of an image is drawn per epoch, as in real data."""
    texts = (f"here is document {number}", sentence(number), "and another thing", sentence(number + 1))
    return texts, ((f"{number}a.png", 1), (f"{number}b.png", 3))


class DataFolder:
    """An MMC4 data set under construction and the corpus that is made of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images"
        self.images.mkdir(parents=True)
        self.shard = path / "docs_shard_0_v2.jsonl"
        self.corpus = path / "corpus"

    def write(self, documents: Sequence[tuple[Texts, Images]]) -> None:
        """Write one shard and a picture for every image."""
        records, count = [], 0
        for texts, images in documents:
            infos = [{"image_name": name, "matched_text_index": index, "matched_sim": 0.5} for name, index in images]
            records.append({"text_list": list(texts), "image_info": infos})
            for name, _ in images:
                (self.images / name).write_bytes(picture(count))
                count += 1
        self.write_lines([json.dumps(record) for record in records])

    def write_lines(self, lines: Sequence[str]) -> None:
        """Write the shard's lines as they are."""
        self.shard.write_text("".join(f"{line}\n" for line in lines))

    def truncate(self, name: str) -> None:
        """Keep an image's header and lose most of its pixels."""
        path = self.images / name
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    @property
    def tokenizer(self) -> Path:
        """A tokenizer of whole words, which keeps documents short."""
        path = self.path / "tokenizer.model"
        if not path.exists():
            texts = [sentence(number) for number in range(260)] * 2 + ["here is document", "and another thing"] * 200
            train_tokenizer(texts, path, 384)
        return path

    def preprocess(self, **changes: Any) -> PreprocessSummary:
        """Make the corpus as ``tools/preprocess_data.py`` does."""
        return preprocess(
            PreprocessConfig(
                input=(self.shard,),
                image_root=self.images,
                tokenizer_model=self.tokenizer,
                output=self.corpus,
                **changes,
            )
        )


def small_config(corpus: Path, **sections: dict[str, Any]) -> RunConfig:
    """One process, fp32, two layers of width 64 on 16 px images, all in this process; ``sections`` change fields."""
    config = RunConfig(
        vision=VisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=8,
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=4,
            drop_path_rate=0.0,
        ),
        pool=PoolConfig(num_attention_heads=4),
        language=LanguageConfig(
            num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, max_position_embeddings=64
        ),
        data=DataConfig(
            data_path=(str(corpus),),
            seq_length=48,
            num_workers=0,
            crop_scale=(1.0, 1.0),
            crop_ratio=(1.0, 1.0),
        ),
        training=TrainingConfig(
            train_iters=8, global_batch_size=4, micro_batch_size=4, precision="fp32", transformer_impl="torch"
        ),
        optimizer=OptimizerConfig(lr=3e-3, lr_warmup_iters=2),
        checkpoint=CheckpointConfig(),
        logging=LoggingConfig(log_interval=1),
    )
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def train_and_read(config: RunConfig) -> list[dict[str, float]]:
    """Run the whole loop in this process; return the reports that it wrote below ``logging.log_dir``."""
    with run_from(config) as run:
        train(run)
    return read_reports(Path(config.logging.log_dir))


def read_reports(log_dir: Path) -> list[dict[str, float]]:
    """Return the lines of ``metrics.jsonl``."""
    return [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
