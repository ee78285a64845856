"""Closed-set classification: attention pool, layer norm and linear layer on patch features (LCL, appendix A.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_megatron.evaluation.encoders.encoder import ImageEncoder
from lcl_megatron.evaluation.encoders.load import load_encoder
from lcl_megatron.evaluation.transfer.accuracy import RANKS, top_hits, top_metrics
from lcl_megatron.evaluation.transfer.augmentation import CropAndFlip
from lcl_megatron.evaluation.transfer.feature_cache import evaluation_reader
from lcl_megatron.evaluation.transfer.fit import Curve, Draw, FitConfig, LossSum, PreparedLoss
from lcl_megatron.evaluation.transfer.frozen_features import FeatureSource, LiveFeatures, open_features
from lcl_megatron.evaluation.transfer.heads import Classifier
from lcl_megatron.evaluation.transfer.image_sets import PixelReader
from lcl_megatron.evaluation.transfer.labelled_sets import LabelledSet, describe_splits
from lcl_megatron.evaluation.transfer.results import TaskResult, Trial
from lcl_megatron.evaluation.transfer.session import FitIdentity, Mode, Session, digest


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings:
    """Settings of the task; what concerns training images holds in full transfer only."""

    fit: FitConfig
    """Training."""
    drop_path_rate: float = 0.0
    """Full transfer: probability of dropping a branch of the encoder's last layer, linear from 0 in the first."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Full transfer: area of the random crop. Frozen transfer sees the centre, whose features can be stored."""
    flip: bool = True
    """Full transfer: mirror half of the images."""
    eval_batch_size: int = 64
    """Images that are scored at the same time by a rank."""
    max_cache_gib: float = 200.0
    """Frozen transfer: features that take more are not stored but computed in every epoch."""


class EncoderAndHead(nn.Module):
    """An encoder that is trained along, and a head on its patch features."""

    def __init__(self, encoder: ImageEncoder, head: nn.Module) -> None:
        """Register both."""
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels: Tensor) -> Tensor:
        """Return what the head makes of images (N, 3, S, S) uint8."""
        output: Tensor = self.head(self.encoder(pixels))
        return output


def classify(
    spec: str,
    train: LabelledSet,
    test: LabelledSet,
    settings: ClassificationSettings,
    mode: Mode,
    seeds: Sequence[int],
    session: Session,
) -> TaskResult:
    """Return the accuracies of an encoder.

    Args:
        spec: which encoder, see ``load_encoder``.
        train: images to fit on.
        test: images to score.
        settings: of the task.
        mode: frozen: only the head is trained; full: the encoder too.
        seeds: of head, order and augmentation; one fit each.
        session: ranks and folders.

    Raises:
        EncoderError, DataError, DivergenceError, FeatureError: see there.
    """
    trial = Trial("classification", mode, dataclasses.asdict(settings))
    encoder = load_encoder(spec).to(session.replicas.device).requires_grad_(False)
    description = session.replicas.from_first(encoder.describe())
    sources = None
    if mode == "frozen":
        precision = settings.fit.precision
        sources = tuple(
            open_features(encoder, split.images, session, precision, settings.max_cache_gib) for split in (train, test)
        )
    hits: dict[int, np.ndarray] = {}
    for seed in seeds:
        session.say(
            f"{encoder.name} {mode}: seed {seed}, {settings.fit.steps} steps of {settings.fit.batch_size} images"
        )
        fitted = _Fitted(spec, description, train, test, settings, seed, session)
        trial.curves[str(seed)], hits[seed] = fitted.frozen(encoder, *sources) if sources else fitted.full()
    metrics = top_metrics(hits, test.labels, len(train.classes))
    return trial.result(description, describe_splits(train, test), metrics)


@dataclass(frozen=True)
class _Fitted:
    """One seed of one encoder."""

    spec: str
    description: dict[str, Any]
    train: LabelledSet
    test: LabelledSet
    settings: ClassificationSettings
    seed: int
    session: Session

    def frozen(self, encoder: ImageEncoder, train: FeatureSource, test: FeatureSource) -> tuple[Curve, np.ndarray]:
        """Fit the head on fixed features; return the curve and the hits on the test images."""
        head = self._new_head(encoder)
        loss = PreparedLoss(
            lambda part: train.read(part.indices), lambda part, read: self._loss(head(train.features(read)), part)
        )
        curve = self.session.fit(head, loss, len(self.train.images), self.settings.fit, self._identity("frozen"))
        return curve, self._score(lambda indices: head(test.features(test.read(indices))))

    def full(self) -> tuple[Curve, np.ndarray]:
        """Fit encoder and head on augmented images; return the curve and the hits on the test images."""
        encoder = load_encoder(self.spec, self.settings.drop_path_rate)
        model = EncoderAndHead(encoder, self._new_head(encoder)).to(self.session.replicas.device)
        augmentation = CropAndFlip(encoder.image_size, self.seed, self.settings.crop_scale, self.settings.flip)
        reader, device = PixelReader(self.train.images, augmentation), self.session.replicas.device
        loss = PreparedLoss(
            lambda part: reader(part.indices, part.keys),
            lambda part, pixels: self._loss(model(pixels.to(device)), part),
        )
        curve = self.session.fit(
            model, loss, len(self.train.images), self.settings.fit, self._identity("full"), encoder.parameters()
        )
        test = LiveFeatures(encoder, evaluation_reader(encoder, self.test.images), self.settings.fit.precision)
        return curve, self._score(lambda indices: model.head(test.features(test.read(indices))))

    def _new_head(self, encoder: ImageEncoder) -> Classifier:
        torch.manual_seed(self.seed)
        return Classifier(encoder.width, len(self.train.classes)).to(self.session.replicas.device)

    def _loss(self, logits: Tensor, part: Draw) -> LossSum:
        labels = torch.from_numpy(self.train.labels[part.indices]).to(logits.device)
        return LossSum(F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels))

    def _identity(self, mode: Mode) -> FitIdentity:
        settings = self.settings
        trained_on = digest(
            "classification", *self.train.contents(), settings.drop_path_rate, settings.crop_scale, settings.flip
        )
        return FitIdentity(self.description, mode, self.seed, trained_on)

    @torch.no_grad()
    def _score(self, logits_of: Callable[[np.ndarray], Tensor]) -> np.ndarray:
        """Return (N, len(RANKS)) whether an image's class is among the first of its logits; equal on all ranks."""
        replicas, size = self.session.replicas, self.settings.eval_batch_size
        share = replicas.share(len(self.test.images))
        hits = [torch.zeros(0, len(RANKS), dtype=torch.int64, device=replicas.device)]
        for begin in range(share.start, share.stop, size):
            indices = np.arange(begin, min(begin + size, share.stop))
            bf16 = self.settings.fit.precision == "bf16"
            with torch.autocast(replicas.device.type, torch.bfloat16, enabled=bf16):
                logits = logits_of(indices).float()
            labels = torch.from_numpy(self.test.labels[indices]).to(logits.device)
            hits.append(top_hits(logits, labels))
        return replicas.gather_shares(torch.cat(hits), len(self.test.images)).cpu().numpy()
