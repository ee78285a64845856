"""How much of the vision tower drop-path leaves out: arithmetic on counts, without a tensor.

The decisions themselves are in ``drop_path.py``.
"""

from __future__ import annotations

import math

from lcl_megatron.config import VisionConfig


def layer_rate(rate: float, layer: int, num_layers: int) -> float:
    """Return the drop rate of a layer: rises linearly from 0 at the first layer to ``rate`` at the last."""
    return rate * layer / max(1, num_layers - 1)


def num_kept(rate: float, num_images: int) -> int:
    """Return M, how many of N images keep a branch of a layer of that rate in mode ``subset``; at least 1."""
    return max(1, math.floor((1.0 - rate) * num_images + 0.5))


def computed_share(vision: VisionConfig, layer: int) -> float:
    """Return the share of images for which a layer's branches are computed in training; 1 in mode ``mask``."""
    if vision.drop_path_mode == "mask":
        return 1.0
    return 1.0 - layer_rate(vision.drop_path_rate, layer, vision.num_layers)
