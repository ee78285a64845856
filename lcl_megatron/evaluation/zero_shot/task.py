"""Zero-shot classification by what pre-training contrasted: pooled image latents and text features at ``<BoI>``.

A class is the mean of the unit features of its prompts; an image belongs to the class whose feature is most similar.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_megatron.evaluation.transfer.accuracy import top_hits, top_metrics
from lcl_megatron.evaluation.transfer.image_sets import DataError, PixelReader
from lcl_megatron.evaluation.transfer.labelled_sets import LabelledSet
from lcl_megatron.evaluation.transfer.results import TaskResult, Trial

BATCH_SIZE = 64
"""Images that are encoded at the same time."""
TEMPLATES = ("a photo of a {}.", "an image of a {}.", "a picture of the {}.", "here is a {}.")
"""Prompts of a class, by default."""


class TextImageModel(Protocol):
    """A model with a common space of images and of the texts before them."""

    @property
    def image_size(self) -> int:
        """Side of the images it reads, in pixels."""
        ...

    def preprocess(self, data: bytes) -> Tensor:
        """Return (3, S, S) uint8 of an encoded image; raises ``ImageError``."""
        ...

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Return (N, D) features of pixels (N, 3, S, S) uint8."""
        ...

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return (N, D) features of texts, at the ``<BoI>`` that follows each."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what results record of it; ``name`` at least."""
        ...


def read_class_names(file: Path, num_classes: int) -> tuple[str, ...]:
    """Return names from a text file, one class a line in the order of the classes.

    Raises:
        DataError: there is no such file, or it has not one name for each class.
    """
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except FileNotFoundError:
        raise DataError(f"there is no file of class names {file}; write one name a line") from None
    if len(names) != num_classes:
        raise DataError(f"{file} has {len(names)} names for {num_classes} classes; write one a line, in their order")
    return names


@torch.no_grad()
def zero_shot(model: TextImageModel, test: LabelledSet, names: Sequence[str], templates: Sequence[str]) -> TaskResult:
    """Return the accuracies of a model that is trained on nothing more.

    Args:
        model: in evaluation mode.
        test: images to score.
        names: what each class of ``test`` is called in prompts.
        templates: prompts with ``{}`` for the name.

    Raises:
        DataError: an image is missing or damaged, or a template has no place for the name.
        ValueError: features are not finite.
    """
    trial = Trial("zero-shot", "", {"templates": list(templates)})
    if not templates or any("{}" not in template for template in templates):
        raise DataError(f"templates {list(templates)}: each needs {{}} where the name of the class stands")
    classes = torch.stack(
        [
            F.normalize(model.embed_prompts([text.replace("{}", name) for text in templates]).float(), dim=1).mean(
                dim=0
            )
            for name in names
        ]
    )
    classes = F.normalize(classes, dim=1)
    reader = PixelReader(test.images, lambda data, _key: model.preprocess(data))
    hits = []
    for first in range(0, len(test.images), BATCH_SIZE):
        indices = np.arange(first, min(first + BATCH_SIZE, len(test.images)))
        scores = F.normalize(model.embed_images(reader(indices)).float(), dim=1) @ classes.T
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(
                f"{model.describe()['name']}: features are not finite, so that no class is the most similar; the run "
                "had diverged: take an earlier checkpoint"
            )
        labels = torch.from_numpy(test.labels[indices]).to(scores.device)
        hits.append(top_hits(scores, labels).cpu())
    metrics = top_metrics({0: torch.cat(hits).numpy()}, test.labels, len(names))
    data = {"test": test.source, "test_images": len(test.images), "classes": list(names)}
    return trial.result(model.describe(), data, metrics)
