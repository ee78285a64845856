"""Ledgers for tests: of small real runs, or written record by record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lcl_megatron.config import RunConfig
from lcl_megatron.data.batch import PackedBatch, StepBatch
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.planning.mixture import RowSequence
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.training.ledger import Attempt
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from tests.distributed import run_distributed
from tests.training.small_runs import DataFolder, plain_document, small_config

STEPS, BATCH = 8, 4
Entry = dict[str, Any]


def ledger_corpus(folder: Path) -> Path:
    """A corpus of twelve documents."""
    data = DataFolder(folder / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


def config_for(corpus: Path, folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run that keeps its ledger and a checkpoint of every third step in ``folder``."""
    config = small_config(
        corpus,
        guard={"ledger_dir": str(folder / "ledger")},
        checkpoint={"save": str(folder / "save"), "save_interval": 3, "async_save": False},
        training={"micro_batch_size": 2},
    )
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    )


def run(config: RunConfig, world_size: int = 1) -> None:
    def body(rank: int, world_size: int) -> None:
        with run_from(config) as started:
            train(started)

    run_distributed(body, world_size)


def interrupt(config: RunConfig, steps: int, world_size: int = 1) -> None:
    """Train so many steps and lose what came after the last checkpoint of the interval, as a kill does."""
    run(dataclasses.replace(config, logging=dataclasses.replace(config.logging, exit_interval=steps)), world_size)
    if steps % config.checkpoint.save_interval:
        shutil.rmtree(Path(config.checkpoint.save) / f"step-{steps:08d}")


def entries(path: Path) -> list[Entry]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path: Path, changed: list[Entry]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in changed))


def expected_rows(config: RunConfig, count: int) -> list[list[Any]]:
    """Number and hash of the first rows of a run, each read on its own."""
    corpora = [Corpus.open(Path(path)) for path in config.data.data_path]
    sequence = RowSequence(corpora, config.data, config.vision.num_patches, config.training.seed)
    rows = []
    for number in range(count):
        batch = collate_rows(sequence, sequence.read(number, 1).rows[:]).batch
        content = b"".join(int(token).to_bytes(8, "little") for token in batch.tokens[0])
        for slot, key in zip(batch.image_slots.tolist(), batch.image_keys.tolist(), strict=False):
            content += slot.to_bytes(8, "little") + key.to_bytes(8, "little")
        rows.append([number, hashlib.blake2b(content, digest_size=16).hexdigest()])
    return rows


def synthetic_attempt(name: str = "a" * 16, **changes: Any) -> Attempt:
    return dataclasses.replace(Attempt(name, 0, 0, 1, 2, "d" * 64, False), **changes)


def synthetic_batch(step: int, numbers: tuple[int, ...]) -> StepBatch:
    """Rows of four tokens that name them."""
    tokens = torch.tensor(numbers)[:, None].repeat(1, 4)
    nothing = torch.zeros(0, dtype=torch.int64)
    blank = torch.zeros(1, dtype=torch.int64)
    batch = PackedBatch(
        tokens=tokens,
        labels=tokens,
        loss_mask=tokens > 0,
        position_ids=tokens,
        cu_seqlens=nothing,
        max_seqlen=4,
        label_positions=nothing,
        image_slots=nothing,
        context_slots=blank,
        has_context=blank > 0,
        image_keys=blank,
        image_ok=blank > 0,
        images=None,
        num_images=0,
    )
    return StepBatch(step, None, (batch,), (), (numbers,))  # type: ignore[arg-type]  # the ledger needs no counts
