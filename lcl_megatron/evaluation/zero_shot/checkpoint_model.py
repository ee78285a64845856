"""A whole training checkpoint as a model of images and texts, for zero-shot evaluation; needs megatron-core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.data.decoding.images import evaluation_image
from lcl_megatron.data.tokenizer import Tokenizer
from lcl_megatron.evaluation.checkpoint_engine import newest_checkpoint, trained_engine
from lcl_megatron.model.parts import present
from lcl_megatron.parallel.engine import Engine


@dataclass(frozen=True)
class CheckpointModel:
    """A model in evaluation mode, in float32, on one process; a ``TextImageModel``."""

    engine: Engine
    """Holds the whole model."""
    tokenizer: Tokenizer
    """That of the run."""
    name: str
    """How it is called in tables."""

    @property
    def image_size(self) -> int:
        """Side of the images it reads, in pixels."""
        return self.engine.config.vision.image_size

    def preprocess(self, data: bytes) -> Tensor:
        """Return (3, S, S) uint8 of an encoded image by OpenCLIP's evaluation transform; raises ``ImageError``."""
        return evaluation_image(data, self.image_size)

    @torch.no_grad()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """Return pooled latents (N, D) of pixels (N, 3, S, S) uint8."""
        model = self.engine.model
        pooled: Tensor = present(model.pool)(present(model.vision)(pixels.to(self.engine.device)))[1]
        return pooled

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return context features (N, D): of documents that begin with a prompt, at the ``<BoI>`` behind it."""
        language = present(self.engine.model.language)
        batch = prompt_batch(self.tokenizer, prompts, self.engine.config.language.max_position_embeddings)
        batch = batch.to(self.engine.device)
        vision, hidden = self.engine.config.vision, self.engine.config.language.hidden_size
        latents_NLH = torch.zeros(1, vision.num_patches, hidden, device=self.engine.device)
        hidden_T1H = language.decode(language.embed(batch, latents_NLH), batch)
        features: Tensor = present(language.heads).context_features(
            language.edge.pick_rows(hidden_T1H, batch.context_slots)
        )
        return features

    def describe(self) -> dict[str, Any]:
        """Return what results record."""
        config = self.engine.config
        return {
            "name": self.name,
            "class": "checkpoint of lcl_megatron",
            "image_size": self.image_size,
            "width": config.vision.hidden_size,
            "tokenizer": self.tokenizer.fingerprint[:16],
        }


def prompt_batch(tokenizer: Tokenizer, prompts: Sequence[str], max_length: int) -> PackedBatch:
    """Return documents ``<s> prompt <BoI>``, one a row, without targets or images.

    Args:
        tokenizer: of the run.
        prompts: B texts, each without special tokens.
        max_length: positions that the model has.

    Raises:
        ValueError: there is no prompt, or one is too long.
    """
    special = tokenizer.special_tokens
    rows = [[special.bos, *tokenizer.encode(prompt), special.boi] for prompt in prompts]
    longest = max(map(len, rows), default=0)
    if not 0 < longest <= max_length:
        raise ValueError(f"{len(prompts)} prompts, the longest of {longest} tokens; expected 1 to {max_length} tokens")
    tokens = torch.full((len(rows), longest), special.pad, dtype=torch.int64)
    positions = torch.zeros_like(tokens)
    borders, context = [0], []
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
        positions[index, : len(row)] = torch.arange(len(row))
        positions[index, len(row) :] = torch.arange(longest - len(row))
        begin = index * longest
        context.append(begin + len(row) - 1)
        # Padding at a row's end is a document of its own, which no prompt sees.
        borders += [begin + len(row)] if len(row) == longest else [begin + len(row), begin + longest]
    none, count = torch.zeros(0, dtype=torch.int64), len(rows)
    return PackedBatch(
        tokens=tokens,
        labels=torch.zeros_like(tokens),
        loss_mask=torch.zeros_like(tokens, dtype=torch.bool),
        position_ids=positions,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=longest,
        label_positions=none,
        image_slots=none,
        context_slots=torch.tensor(context),
        has_context=torch.ones(count, dtype=torch.bool),
        image_keys=torch.zeros(count, dtype=torch.int64),
        image_ok=torch.zeros(count, dtype=torch.bool),
        images=None,
        num_images=0,
    )


@contextmanager
def checkpoint_model(checkpoint: Path, tokenizer_model: Path | None = None) -> Iterator[CheckpointModel]:
    """Yield the model of a checkpoint, which may come from any layout.

    Args:
        checkpoint: a ``step-NNNNNNNN`` folder, or a folder that holds some; the newest is taken.
        tokenizer_model: SentencePiece file; None = the one that the run's configuration names, or its corpus holds.

    Raises:
        CheckpointError: there is no complete checkpoint.
        ConfigError: the tokenizer cannot be read or is another one.
    """
    found, config = newest_checkpoint(checkpoint)
    if tokenizer_model is None:
        named, corpora = config.data.tokenizer_model, config.data.data_path
        tokenizer_model = Path(named) if named else Path(corpora[0] if corpora else "") / "tokenizer.model"
    tokenizer = Tokenizer.load(tokenizer_model)
    with trained_engine(found, config) as engine:
        yield CheckpointModel(engine, tokenizer, f"{found.parent.name}/{found.name}")
