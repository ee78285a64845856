"""The upper reference: the same vision tower, trained with the labels of the images that the documents show.

Same initial weights, images, crops, number of images seen, batch, optimizer settings and schedule as the other runs;
a linear classifier on the mean of the patch features takes the place of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.nn import functional as F

from lcl_megatron.config import RunConfig
from lcl_megatron.data.decoding.images import TrainingTransform
from lcl_megatron.data.image_stores.image_folder import ImageFolder
from lcl_megatron.model.initialization import initialize_weights
from lcl_megatron.model.lcl import LCLModel
from lcl_megatron.model.specs import Runtime
from lcl_megatron.model.vision import VisionTower


@dataclass(frozen=True)
class TowerEncoder:
    """A vision tower as a function from pixels to features."""

    tower: VisionTower
    """The tower."""
    device: torch.device
    """Where it lives."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the mean over patches of the tower's features, (N, C) float32, of (N, 3, size, size) uint8."""
        return self.tower(images.to(self.device)).mean(dim=1).float().cpu()


@dataclass(frozen=True)
class LabelledFiles:
    """Images to train on."""

    names: tuple[str, ...]
    """Names of N files."""
    labels: Tensor
    """(N,) int64."""
    folder: ImageFolder
    """Where they are."""


def untrained_tower(config: RunConfig, collection: ProcessGroupCollection, device: torch.device) -> VisionTower:
    """Return the tower with the weights that a run of this configuration begins with.

    Args:
        config: the run, with its vocabulary filled in.
        collection: process groups of a single process.
        device: where the tower shall live.
    """
    model = LCLModel(config, Runtime(collection=collection))
    initialize_weights(model, config.training.seed)
    assert model.vision is not None
    return model.vision.to(device)


def train_with_labels(
    config: RunConfig, tower: VisionTower, files: LabelledFiles, images_per_step: int, device: torch.device
) -> tuple[int, float]:
    """Train the tower in place for ``config.training.train_iters`` steps.

    Returns:
        Images seen, and the mean cross-entropy of the last tenth of the steps.
    """
    torch.manual_seed(config.training.seed)
    classifier = nn.Linear(config.vision.hidden_size, int(files.labels.max()) + 1, device=device)
    parameters = [*tower.parameters(), *classifier.parameters()]
    optimizer = _optimizer(config, parameters)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(config, step))
    losses = []
    for images, labels in _batches(config, files, images_per_step):
        keys = torch.zeros(len(labels), dtype=torch.int64, device=device)
        patches_T1C = tower.encode(tower.embed(images.to(device)), keys, None)
        features_NC = tower.finish(patches_T1C, len(labels)).mean(dim=1)
        loss = F.cross_entropy(classifier(features_NC), labels.to(device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if config.optimizer.clip_grad:
            nn.utils.clip_grad_norm_(parameters, config.optimizer.clip_grad)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, len(losses) // 10) :]
    return len(losses) * images_per_step, sum(last) / len(last)


def _optimizer(config: RunConfig, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """Return AdamW with the run's settings; 1-D parameters are not decayed, as in the run."""
    settings = config.optimizer
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    spared = [parameter for parameter in parameters if parameter.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": spared, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )


def _rate(config: RunConfig, step: int) -> float:
    """Return the share of the peak rate at a step: linear warm-up and cosine decay, as in the run."""
    settings, steps = config.optimizer, config.training.train_iters
    if step < settings.lr_warmup_iters:
        return (step + 1) / settings.lr_warmup_iters
    done = (step + 1 - settings.lr_warmup_iters) / max(1, steps - settings.lr_warmup_iters)
    lowest = settings.min_lr / settings.lr
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _batches(config: RunConfig, files: LabelledFiles, images_per_step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pixels (n, 3, size, size) uint8 and labels (n,) of each step; every epoch in a new random order."""
    transform = TrainingTransform(
        size=config.vision.image_size,
        seed=config.training.seed,
        crop_scale=config.data.crop_scale,
        crop_ratio=config.data.crop_ratio,
    )
    generator = torch.Generator().manual_seed(config.training.seed)
    encoded = [files.folder.read(name) for name in files.names]
    order: list[int] = []
    for step in range(config.training.train_iters):
        while len(order) < images_per_step:
            order += torch.randperm(len(encoded), generator=generator).tolist()
        chosen, order = order[:images_per_step], order[images_per_step:]
        first_key = step * images_per_step
        pixels = [transform(encoded[index], first_key + place) for place, index in enumerate(chosen)]
        yield torch.stack(pixels), files.labels[chosen]
