"""How far an imported vision tower is from the library it comes from: features of both on the same images."""

from __future__ import annotations

import torch
from torch import Tensor

from lcl_megatron.checkpoint.convert.measurement import Measurement
from lcl_megatron.checkpoint.convert.stock_tower import StockTower
from lcl_megatron.checkpoint.weights import ModelWeights
from lcl_megatron.config import ParallelConfig
from lcl_megatron.model.specs import Runtime
from lcl_megatron.model.vision import VisionTower
from lcl_megatron.parallel.groups import initialize


def tower_features(weights: ModelWeights, images: Tensor) -> Tensor:
    """Return what our vision tower computes with these weights, in float32 on one process.

    Args:
        weights: holds at least the vision tower.
        images: (N, 3, H, W) normalised float32.

    Returns:
        (N, P, C) features of the patches, on the CPU.
    """
    weights.require("vision")
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    try:
        tower = VisionTower(weights.config.vision, Runtime(collection=groups.collection))
        state = {name.removeprefix("vision."): t for name, t in weights.state.items() if name.startswith("vision.")}
        tower.load_state_dict(state, strict=True)
        tower.to(groups.device).eval()
        with torch.no_grad():
            features: Tensor = tower(images.to(groups.device)).cpu()
    finally:
        groups.destroy()
    return features


def compare_features(stock: StockTower, weights: ModelWeights) -> Measurement:
    """Return how far our features are from the library's; both see two images of normal noise."""
    size = stock.vision.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = stock.features(images)
    return Measurement.of_outputs(stock.library, tower_features(weights, images), theirs)
