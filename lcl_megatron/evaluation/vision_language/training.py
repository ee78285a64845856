"""Training of a vision-language model on texts about images, by the training loop of all transfer tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lcl_megatron.evaluation.transfer.fit import Curve, Draw, FitConfig, LossSum, PreparedLoss, fit
from lcl_megatron.evaluation.transfer.image_sets import ImageSet
from lcl_megatron.evaluation.vision_language.answering import pixel_reader
from lcl_megatron.evaluation.vision_language.assembly import Assembled
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
    model, reader = assembled.model, pixel_reader(assembled, texts.images)
    model.set_trained(parts)
    size = assembled.encoder.image_size

    def prepare(part: Draw) -> SequenceBatch:
        sequences = [texts.sequence(index) for index in part.indices.tolist()]
        # A text that was cut off has lost its last images too.
        numbers = [
            texts.image_numbers(index)[: sequence.num_images]
            for index, sequence in zip(part.indices.tolist(), sequences, strict=True)
        ]
        flat = np.array([number for of_text in numbers for number in of_text], dtype=np.int64)
        if not len(flat):
            return collate(sequences, torch.zeros(0, 3, size, size, dtype=torch.uint8))
        pixels, is_good = reader.read_good(flat, size=size)
        owners = np.repeat(np.arange(len(numbers)), [len(of_text) for of_text in numbers])
        for row in set(owners[~is_good.numpy()].tolist()):
            sequences[row] = dataclasses.replace(sequences[row], labels=np.full_like(sequences[row].labels, IGNORED))
        return collate(sequences, pixels)

    def compute(_part: Draw, batch: SequenceBatch) -> LossSum:
        return LossSum(*model.loss_sum(batch.to(replicas.device)))

    return fit(
        model,
        PreparedLoss(prepare, compute),
        len(texts),
        config,
        replicas,
        seed=seed,
        pretrained=model.pretrained_parameters(),
        state_file=state_file,
    )
