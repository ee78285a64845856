"""Training of a vision-language model on texts about images, by the training loop of all transfer tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lcl_megatron.evaluation.transfer.fit import Curve, Draw, FitConfig, LossSum, PreparedLoss, fit
from lcl_megatron.evaluation.transfer.image_sets import ImageSet, PixelReader
from lcl_megatron.evaluation.transfer.session import FitIdentity, Session
from lcl_megatron.evaluation.vision_language.answering import pixel_reader
from lcl_megatron.evaluation.vision_language.assembly import Assembled, save_model
from lcl_megatron.evaluation.vision_language.model import Part
from lcl_megatron.evaluation.vision_language.sequences import IGNORED, SequenceBatch, TokenSequence, collate
from lcl_megatron.parallel.replicas import Replicas


class TrainingTexts(Protocol):
    """Texts about images, by number."""

    @property
    def images(self) -> ImageSet:
        """The images."""
        ...

    def __len__(self) -> int:
        """Return the number of texts."""
        ...

    def sequence(self, index: int) -> TokenSequence:
        """Return a text's tokens."""
        ...

    def image_numbers(self, index: int) -> tuple[int, ...]:
        """Return which images of ``images`` a text is about, in the order of their places."""
        ...


def train_parts(
    assembled: Assembled,
    parts: Iterable[Part],
    texts: TrainingTexts,
    config: FitConfig,
    replicas: Replicas,
    *,
    seed: int = 0,
    state_file: Path | None = None,
) -> Curve:
    """Train some parts of a model; the loss is the mean cross-entropy over all learnt tokens of a global batch.

    A text with an image that cannot be decoded is read but not learnt.

    Args:
        assembled: the model, which is changed; in evaluation mode afterwards.
        parts: what is trained.
        texts: what it is trained on.
        config: how.
        replicas: the ranks that share each batch.
        seed: of the order of texts.
        state_file: see ``fit``.

    Returns:
        The training curve.

    Raises:
        DivergenceError, NothingToLearnError, ConfigError, OSError: see ``fit``.
    """
    model = assembled.model
    model.set_trained(parts)
    batches = _Batches(texts, pixel_reader(assembled, texts.images), assembled.encoder.image_size)

    def compute(_draw: Draw, batch: SequenceBatch) -> LossSum:
        return LossSum(*model.loss_sum(batch.to(replicas.device)))

    return fit(
        model,
        PreparedLoss(batches.read, compute),
        len(texts),
        config,
        replicas,
        seed=seed,
        pretrained=model.pretrained_parameters(),
        state_file=state_file,
    )


@dataclass(frozen=True)
class _Batches:
    """Texts with their images."""

    texts: TrainingTexts
    pixels: PixelReader
    size: int
    """Side of the images that the encoder reads, in pixels."""

    def read(self, draw: Draw) -> SequenceBatch:
        """Return some texts; nothing is learnt of one with an image that cannot be decoded."""
        sequences = [self.texts.sequence(index) for index in draw.indices.tolist()]
        # A text that was cut off has lost its last images too.
        numbers = [
            self.texts.image_numbers(index)[: sequence.num_images]
            for index, sequence in zip(draw.indices.tolist(), sequences, strict=True)
        ]
        flat = np.array([number for of_text in numbers for number in of_text], dtype=np.int64)
        if not len(flat):
            return collate(sequences, torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8))
        pixels, is_good = self.pixels.read_good(flat, size=self.size)
        owners = np.repeat(np.arange(len(numbers)), [len(of_text) for of_text in numbers])
        for row in set(owners[~is_good.numpy()].tolist()):
            sequences[row] = dataclasses.replace(sequences[row], labels=np.full_like(sequences[row].labels, IGNORED))
        return collate(sequences, pixels)


@dataclass(frozen=True)
class Stage:
    """One training of a model, of which it may have several."""

    name: str
    """Begins the model's name."""
    unit: str
    """What a text is, in the plural; for messages."""
    parts: tuple[Part, ...]
    """What is trained."""
    config: FitConfig
    """How."""
    fit: FitIdentity
    """Which fit it is."""
    saves_model: bool
    """Whether the model is written to OUTPUT/models."""

    @property
    def model_name(self) -> str:
        """``captioning-ENCODER-frozen-seed0``: name of the folder of the model."""
        return f"{self.name}-{self.fit.name}"


def train_stage(assembled: Assembled, stage: Stage, texts: TrainingTexts, session: Session) -> Curve:
    """Train a model, and save it if the stage says so; see ``train_parts``.

    Args:
        assembled: the model, which is changed.
        stage: what is trained, and how.
        texts: what it is trained on.
        session: ranks and folders.
    """
    config = stage.config
    session.say(f"{stage.model_name}: {config.steps} steps of {config.batch_size} of {len(texts):,} {stage.unit}")
    curve = train_parts(
        assembled,
        stage.parts,
        texts,
        config,
        session.replicas,
        seed=stage.fit.seed,
        state_file=session.state_file(stage.fit),
    )
    if stage.saves_model and session.replicas.is_first:
        save_model(assembled, session.output / "models" / stage.model_name)
    session.replicas.barrier()
    return curve
