"""Vision towers of other libraries: what they have in common for an import, and what does not fit our tower.

Our tower is CLIP's: LayerNorm before the first layer, patches projected without a bias, learned positions, one row of
them for the class token, a bias on every other matrix, LayerScale or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lcl_megatron.checkpoint.convert.table import Table
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import VisionConfig


@dataclass(frozen=True)
class StockTower:
    """A vision tower of another library, with its weights."""

    library: str
    """``timm``, ``open_clip`` or ``clip``."""
    vision: VisionConfig
    """The tower of ours that is the same function."""
    table: Table
    """Where the library keeps our parameters."""
    state: Mapping[str, Tensor]
    """float32 parameters of the tower under the library's names, without pooling and heads."""
    features: Callable[[Tensor], Tensor]
    """From normalised images (N, 3, H, W) to what the library's own code computes: the last LayerNorm's output at the
    patches, (N, P, C)."""


def activation_name(activation: Callable[[Tensor], Tensor]) -> Literal["gelu", "quick_gelu"]:
    """Return the value of ``vision.activation`` for a library's activation, told by what it computes.

    Raises:
        CheckpointError: it is neither of ours; the nearest other, GELU by tanh, would cost 6e-4 of the features.
    """
    probe = torch.linspace(-6, 6, 97)
    found = activation(probe)
    if torch.allclose(found, nn.functional.gelu(probe), rtol=0, atol=1e-6):
        return "gelu"
    if torch.allclose(found, probe * torch.sigmoid(1.702 * probe), rtol=0, atol=1e-6):
        return "quick_gelu"
    raise CheckpointError(
        f"the tower's activation is {activation}; ours are erf-GELU (gelu) and x * sigmoid(1.702 x) (quick_gelu)"
    )


def layernorm_epsilon(tower: nn.Module) -> float:
    """Return the epsilon that all LayerNorms of a tower share.

    Raises:
        CheckpointError: it has none, or they differ.
    """
    found = sorted({module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)})
    if len(found) != 1:
        raise CheckpointError(f"the tower's LayerNorms have the epsilons {found or 'none'}; ours has one for all")
    return found[0]


def require_fit(reasons: Mapping[str, bool], source: str) -> None:
    """Raise CheckpointError naming every reason that holds; each says what our tower does not have."""
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        listed = "\n  ".join(found)
        raise CheckpointError(
            f"{source}: our vision tower cannot hold it exactly:\n  {listed}\nWhat fits: CLIP's towers, such as timm's "
            "vit_*_clip_*, open_clip's ViT-* and transformers' CLIPVisionModel"
        )
