"""Image-text retrieval with a fresh text encoder, trained by CLIP's loss over all ranks (LCL, appendix A.2).

An image is its attention-pooled patch features behind a linear layer; a caption the last token of a causal
transformer, behind another one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lcl_megatron.config.errors import require
from lcl_megatron.data.order import keyed_hash
from lcl_megatron.evaluation.encoders.encoder import ImageEncoder
from lcl_megatron.evaluation.encoders.load import load_encoder
from lcl_megatron.evaluation.retrieval.recall import chance_recalls, recalls
from lcl_megatron.evaluation.retrieval.text_encoder import (
    TextEncoder,
    TextTokenizer,
    TokenBatch,
    open_tokenizer,
    tokenize,
)
from lcl_megatron.evaluation.transfer.augmentation import CropAndFlip
from lcl_megatron.evaluation.transfer.caption_sets import CaptionedSet
from lcl_megatron.evaluation.transfer.feature_cache import encode, evaluation_reader
from lcl_megatron.evaluation.transfer.fit import Curve, Draw, FitConfig, LossSum, PreparedLoss
from lcl_megatron.evaluation.transfer.frozen_features import open_features
from lcl_megatron.evaluation.transfer.heads import AttentionPool
from lcl_megatron.evaluation.transfer.image_sets import PixelReader
from lcl_megatron.evaluation.transfer.results import MetricSummary, TaskResult, Trial, UnitScores, summarize_units
from lcl_megatron.evaluation.transfer.session import FitIdentity, Mode, Session, digest
from lcl_megatron.evaluation.transfer.streams import TransferStream

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)
"""CLIP's."""


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """Settings of the task."""

    fit: FitConfig
    """Training; ``pretrained_lr`` is the image encoder's, in full transfer."""
    text_width: int = 512
    """Width of the text encoder. The paper does not say its size; the defaults are those of CLIP's B models."""
    text_layers: int = 12
    """Layers of the text encoder."""
    context_length: int = 77
    """Tokens of a caption, start and end included; longer ones are cut."""
    embedding_width: int = 512
    """Width of the space in which images and captions are compared."""
    tokenizer: str = ""
    """Folder of a transformers tokenizer; empty = CLIP's, which comes with open_clip."""
    drop_path_rate: float = 0.0
    """Full transfer: probability of dropping a branch of the encoder's last layer, linear from 0 in the first."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Full transfer: area of the random crop. Nothing is mirrored: captions say left and right."""
    embed_at_once: int = 0
    """Pairs of a rank whose activations are in memory at the same time; they are computed twice. 0 = all, once."""
    eval_batch_size: int = 64
    """Images or captions that are scored at the same time by a rank."""
    max_cache_gib: float = 200.0
    """Frozen transfer: features that take more are not stored but computed in every epoch."""

    def __post_init__(self) -> None:
        require(
            self.fit.micro_batch_size == 0,
            f"fit.micro_batch_size = {self.fit.micro_batch_size}: negatives are the whole batch, which cannot be "
            "computed in parts; to save memory set embed_at_once instead",
        )
        require(self.context_length >= 3, f"context_length = {self.context_length}; expected at least 3")


class TwoTowers(nn.Module):
    """Image and text side of retrieval."""

    def __init__(self, encoder: ImageEncoder, vocab_size: int, settings: RetrievalSettings, trains: bool) -> None:
        """Make the heads of random weights.

        Args:
            encoder: of the images.
            vocab_size: of the tokenizer.
            settings: of the task.
            trains: whether the encoder is a part that is trained; else ``embed_images`` takes its features.
        """
        super().__init__()
        self.encoder = encoder if trains else None
        self.pool = AttentionPool(encoder.width)
        self.projection = nn.Linear(encoder.width, settings.embedding_width)
        self.text = TextEncoder(
            vocab_size, settings.context_length, settings.text_width, settings.text_layers, settings.embedding_width
        )
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def embed_images(self, images: Tensor) -> Tensor:
        """Return (N, D) of pixels (N, 3, S, S) uint8, or of features (N, P, C) if the encoder is no part of this."""
        features = images if self.encoder is None else self.encoder(images)
        embedded: Tensor = self.projection(self.pool(features))
        return embedded

    def forward(self, images: Tensor, ids: Tensor, lengths: Tensor, at_once: int = 0) -> tuple[Tensor, Tensor]:
        """Return (N, D) of images and (N, D) of texts; only ``at_once`` pairs keep activations, 0 = all."""
        if not at_once or at_once >= len(ids):
            return self.embed_images(images), self.text(ids, lengths)
        # Gradient caching: embeddings of all, activations of a part, recomputed with the same drop-path masks.
        found = [
            checkpoint(self._embed_part, *(tensor[begin : begin + at_once] for tensor in (images, ids, lengths)),
                       use_reentrant=False)
            for begin in range(0, len(ids), at_once)
        ]  # fmt: skip
        return torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])

    def _embed_part(self, images: Tensor, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed_images(images), self.text(ids, lengths)


def retrieve(
    spec: str,
    train: CaptionedSet,
    tests: Sequence[CaptionedSet],
    settings: RetrievalSettings,
    mode: Mode,
    seeds: Sequence[int],
    session: Session,
) -> list[TaskResult]:
    """Return the recalls of an encoder on every test set.

    Args:
        spec: which encoder, see ``load_encoder``.
        train: images with captions; an epoch sees each image once, with a random one of its captions.
        tests: test sets.
        settings: of the task.
        mode: frozen: pool, projections and text encoder are trained; full: the image encoder too.
        seeds: of weights, order, captions and augmentation; one fit each.
        session: ranks and folders.

    Raises:
        ConfigError, EncoderError, DataError, DivergenceError, FeatureError: see there.
    """
    trial = Trial("retrieval", mode, dataclasses.asdict(settings))
    tokenizer = open_tokenizer(Path(settings.tokenizer) if settings.tokenizer else None)
    encoder = load_encoder(spec).to(session.replicas.device).requires_grad_(False)
    description = session.replicas.from_first(encoder.describe())
    scores: list[dict[int, dict[str, UnitScores]]] = [{} for _ in tests]
    for seed in seeds:
        session.say(
            f"{encoder.name} {mode}: seed {seed}, {settings.fit.steps} steps of {settings.fit.batch_size} pairs"
        )
        fitted = _Fitted(spec, description, train, settings, seed, session, tokenizer)
        model, trial.curves[str(seed)] = fitted.frozen(encoder) if mode == "frozen" else fitted.full()
        for found, test in zip(scores, tests, strict=True):
            found[seed] = fitted.score(model, encoder, test)
    return [
        trial.result(description, _data(train, test), _metrics(found, test))
        for found, test in zip(scores, tests, strict=True)
    ]


def _metrics(scores: dict[int, dict[str, UnitScores]], test: CaptionedSet) -> tuple[MetricSummary, ...]:
    chances = chance_recalls(np.array([len(texts) for texts in test.captions]))
    return tuple(
        summarize_units(name, {seed: by_name[name] for seed, by_name in scores.items()}, chance)
        for name, chance in chances.items()
    )


def _data(train: CaptionedSet, test: CaptionedSet) -> dict[str, Any]:
    return {
        "train": train.source,
        "train_images": len(train),
        "train_left_out": train.left_out,
        "test": test.source,
        "test_images": len(test),
        "test_captions": sum(map(len, test.captions)),
    }


@dataclass(frozen=True)
class _Fitted:
    """One seed of one encoder."""

    spec: str
    description: dict[str, Any]
    train: CaptionedSet
    settings: RetrievalSettings
    seed: int
    session: Session
    tokenizer: TextTokenizer

    def frozen(self, encoder: ImageEncoder) -> tuple[TwoTowers, Curve]:
        """Fit all but the image encoder."""
        precision = self.settings.fit.precision
        source = open_features(encoder, self.train.images, self.session, precision, self.settings.max_cache_gib)
        model = self._new_model(encoder, trains=False)
        loss = PreparedLoss(
            lambda part: (source.read(part.indices), None, self._tokens(part)),
            lambda _part, read: self._loss(model, source.features(read[0]), read[1], read[2]),
        )
        curve = self.session.fit(model, loss, len(self.train), self.settings.fit, self._identity("frozen"))
        return model, curve

    def full(self) -> tuple[TwoTowers, Curve]:
        """Fit everything, on augmented images; damaged ones are left out of both sides of the loss."""
        encoder = load_encoder(self.spec, self.settings.drop_path_rate)
        model = self._new_model(encoder, trains=True)
        augmentation = CropAndFlip(encoder.image_size, self.seed, self.settings.crop_scale, flip=False)
        reader, device = PixelReader(self.train.images, augmentation), self.session.replicas.device
        loss = PreparedLoss(
            lambda part: (*reader.read_good(part.indices, part.keys, encoder.image_size), self._tokens(part)),
            lambda _part, read: self._loss(model, read[0].to(device), read[1], read[2]),
        )
        curve = self.session.fit(
            model, loss, len(self.train), self.settings.fit, self._identity("full"), encoder.parameters()
        )
        return model, curve

    def _new_model(self, encoder: ImageEncoder, trains: bool) -> TwoTowers:
        torch.manual_seed(self.seed)
        return TwoTowers(encoder, self.tokenizer.vocab_size, self.settings, trains).to(self.session.replicas.device)

    def _tokens(self, part: Draw) -> TokenBatch:
        """Return a random caption of each image."""
        choices = keyed_hash(self.seed, TransferStream.CAPTION_CHOICE, part.keys)
        all_captions = [self.train.captions[index] for index in part.indices.tolist()]
        texts = [texts[choice % len(texts)] for texts, choice in zip(all_captions, choices.tolist(), strict=True)]
        return tokenize(self.tokenizer, texts, self.settings.context_length)

    def _loss(self, model: TwoTowers, images: Tensor, is_good: Tensor | None, tokens: TokenBatch) -> LossSum:
        ids, lengths = (tensor.to(images.device) for tensor in tokens)
        # CLIP's limit, on the parameter itself: a clamp in the graph would have no gradient beyond, and no way back.
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        image_features, text_features = model(images, ids, lengths, self.settings.embed_at_once)
        total = self.session.replicas.contrast(image_features, text_features, model.logit_scale, is_good)
        return LossSum(total, len(ids) if is_good is None else float(is_good.sum()))

    def _identity(self, mode: Mode) -> FitIdentity:
        settings = self.settings
        trained_on = digest(
            "retrieval", *self.train.contents(), settings.drop_path_rate, settings.crop_scale, settings.tokenizer
        )
        return FitIdentity(self.description, mode, self.seed, trained_on)

    @torch.no_grad()
    def score(self, model: TwoTowers, frozen: ImageEncoder, test: CaptionedSet) -> dict[str, UnitScores]:
        """Return the recalls on a test set, equal on all ranks; ``frozen`` encodes if the model's own does not."""
        encoder = frozen if model.encoder is None else model.encoder
        precision = self.settings.fit.precision
        reader = evaluation_reader(encoder, test.images)
        texts = [text for all_texts in test.captions for text in all_texts]

        def embed_images(indices: np.ndarray) -> Tensor:
            features = encode(encoder, reader(indices), precision).float()
            embedded: Tensor = model.projection(model.pool(features))
            return embedded

        def embed_texts(indices: np.ndarray) -> Tensor:
            tokens = tokenize(self.tokenizer, [texts[index] for index in indices], self.settings.context_length)
            embedded: Tensor = model.text(*(tensor.to(self.session.replicas.device) for tensor in tokens))
            return embedded

        images, captions = self._embed(embed_images, len(test)), self._embed(embed_texts, len(texts))
        image_of_text = np.repeat(np.arange(len(test)), [len(all_texts) for all_texts in test.captions])
        return recalls(images, captions, torch.from_numpy(image_of_text).to(images.device))

    def _embed(self, embed: Callable[[np.ndarray], Tensor], count: int) -> Tensor:
        """Return (count, D) float32 features of length 1, computed by all ranks together."""
        replicas, size = self.session.replicas, self.settings.eval_batch_size
        share, bf16 = replicas.share(count), self.settings.fit.precision == "bf16"
        found = [torch.zeros(0, self.settings.embedding_width, device=replicas.device)]
        for begin in range(share.start, share.stop, size):
            with torch.autocast(replicas.device.type, torch.bfloat16, enabled=bf16):
                embedded = embed(np.arange(begin, min(begin + size, share.stop)))
            found.append(F.normalize(embedded.float(), dim=1))
        return replicas.gather_shares(torch.cat(found), count)
