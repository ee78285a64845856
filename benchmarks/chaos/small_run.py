"""The run that faults are tried on: real preprocessing and training, of a corpus made on the spot, in milliseconds.

All that may differ between two starts of a run is switched on: random crops, drop-path, images placed at random,
packing, a schedule, a data-parallel optimizer.
"""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcl_megatron.config import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LanguageConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PoolConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from lcl_megatron.data.preprocessing.preprocess import PreprocessConfig, preprocess
from lcl_megatron.data.tokenizer import train_tokenizer

ANIMALS = "ant bee cat dog elk fox gnu hen ibis jay kiwi lynx mole newt owl pug quail rat seal toad".split()
PLACES = "attic barn cave desert empty field garden hill island jungle kitchen lake mill".split()
VOCABULARY = 384


@dataclass(frozen=True)
class Layout:
    """How a run is spread over ranks."""

    name: str
    """How it is called in tables."""
    dp: int = 1
    """Data-parallel ranks."""
    tp: int = 1
    """Tensor-parallel ranks."""
    pp: int = 1
    """Pipeline ranks."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.dp * self.tp * self.pp


ONE = Layout("one")
DP2, TP2, PP2 = Layout("dp2", dp=2), Layout("tp2", tp=2), Layout("pp2", pp=2)
DP2_TP2, DP2_PP2, TP2_PP2 = Layout("dp2 x tp2", 2, 2), Layout("dp2 x pp2", 2, 1, 2), Layout("tp2 x pp2", 1, 2, 2)


def sentence(number: int) -> str:
    """Return a sentence that no other number below 260 has."""
    return f"the {ANIMALS[number % len(ANIMALS)]} lives in the {PLACES[number % len(PLACES)]} with {number} friends"


def make_corpus(folder: Path, documents: int = 48) -> Path:
    """Write an MMC4 shard with two images in each document, preprocess it, and return the corpus.

    Args:
        folder: a folder to make.
        documents: how many.
    """
    images, shard, model = folder / "images", folder / "docs_shard_0_v2.jsonl", folder / "tokenizer.model"
    images.mkdir(parents=True)
    lines = []
    for number in range(documents):
        texts = [f"here is document {number}", sentence(number), "and another thing", sentence(number + 1)]
        infos = []
        for place, name in ((1, f"{number}a.png"), (3, f"{number}b.png")):
            (images / name).write_bytes(_picture(2 * number + place // 2))
            infos.append({"image_name": name, "matched_text_index": place, "matched_sim": 0.5})
        lines.append(json.dumps({"text_list": texts, "image_info": infos}) + "\n")
    shard.write_text("".join(lines), encoding="utf-8")
    texts = [sentence(number) for number in range(260)] * 2 + ["here is document", "and another thing"] * 200
    train_tokenizer(texts, model, VOCABULARY)
    config = PreprocessConfig(input=(shard,), image_root=images, tokenizer_model=model, output=folder / "corpus")
    return preprocess(config).corpus.path


def _picture(number: int) -> bytes:
    """Return a PNG of smooth colours that no other number has."""
    grid = np.random.default_rng([7, number]).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grid).resize((20, 20), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def small_config(corpus: Path, layout: Layout, **sections: dict[str, Any]) -> RunConfig:
    """Return two layers of width 32 on 16 px images in fp32, spread by a layout; ``sections`` change fields.

    Args:
        corpus: what is read.
        layout: how it is spread.
        sections: fields to change, by section.
    """
    config = RunConfig(
        vision=VisionConfig(
            image_size=16,
            patch_size=8,
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            drop_path_rate=0.2,
        ),
        pool=PoolConfig(num_attention_heads=4),
        language=LanguageConfig(
            num_layers=2,
            hidden_size=32,
            ffn_hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=64,
            # The same padding with and without tensor parallelism.
            make_vocab_size_divisible_by=64,
        ),
        data=DataConfig(data_path=(str(corpus),), seq_length=48, num_workers=0),
        training=TrainingConfig(
            train_iters=60,
            global_batch_size=4,
            # Contrast groups hold the same rows in every layout.
            micro_batch_size=2 if layout.dp > 1 else 4,
            precision="fp32",
            transformer_impl="torch",
        ),
        optimizer=OptimizerConfig(lr=3e-3, lr_warmup_iters=2),
        parallel=ParallelConfig(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            distributed_timeout_minutes=1.0,
        ),
        checkpoint=CheckpointConfig(save_interval=5),
        guard=GuardConfig(),
        logging=LoggingConfig(log_interval=1000),
    )
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )
