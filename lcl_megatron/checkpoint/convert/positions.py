"""A vision tower for images of another size: its position embeddings resampled."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.checkpoint.weights import ModelWeights

_NAME = "vision.embedding.position_embeddings"


def resample_positions(positions: Tensor, has_class_token: bool, grid: int) -> Tensor:
    """Return position embeddings for ``grid`` x ``grid`` patches: bicubic with antialias, as timm does.

    Args:
        positions: (P, C), the class token's row first if there is one; the patches' grid is square.
        has_class_token: whether there is that row, which stays as it is.
        grid: patches along a side.
    """
    first, patches = positions[: int(has_class_token)], positions[int(has_class_token) :]
    old = round(patches.shape[0] ** 0.5)
    image = patches.float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    resampled = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([first, resampled[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)])


def for_image_size(weights: ModelWeights, image_size: int) -> ModelWeights:
    """Return weights whose vision tower reads images of another size.

    Args:
        weights: holds at least the vision tower.
        image_size: side in pixels.

    Raises:
        ConfigError: the patch size does not divide it.
    """
    weights.require("vision")
    config = weights.config
    vision = dataclasses.replace(config.vision, image_size=image_size)
    positions = resample_positions(weights.state[_NAME], vision.class_token, image_size // vision.patch_size)
    return dataclasses.replace(
        weights,
        config=dataclasses.replace(config, vision=vision),
        state={**weights.state, _NAME: positions},
    )
