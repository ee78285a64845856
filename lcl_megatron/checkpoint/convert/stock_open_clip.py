"""Vision towers of open_clip models: built-in names with a pretrained tag or file, hub names, local folders."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from lcl_megatron.checkpoint.convert.official import open_clip_table
from lcl_megatron.checkpoint.convert.stock_timm import timm_tower
from lcl_megatron.checkpoint.convert.stock_tower import (
    StockTower,
    activation_name,
    layernorm_epsilon,
    require_fit,
)
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.refused_pickles import what_failed
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.config import VisionConfig

_SCHEMES = ("hf-hub:", "local-dir:")
_HEADS = ("proj", "attn_pool.")


def load_open_clip(name: str) -> StockTower:
    """Load the vision tower of an open_clip model.

    Args:
        name: ``MODEL/PRETRAINED`` (a tag, or the path of a weights file), ``hf-hub:ORG/NAME`` or ``local-dir:PATH``.

    Raises:
        CheckpointError: it cannot be loaded or has no weights, or our tower cannot hold it exactly.
        LibraryError: open_clip is not installed.
    """
    open_clip = stock_library("open_clip")
    source = f"open_clip:{name}"
    model_name, pretrained = (name, "") if name.startswith(_SCHEMES) else name.partition("/")[::2]
    try:
        with warnings.catch_warnings():
            # Weights that were trained with another activation than the model runs them with.
            warnings.filterwarnings("error", "QuickGELU mismatch")
            model = open_clip.create_model(model_name, pretrained or None, require_pretrained=True)
    # What hub, file or name may be wrong raises nearly anything.
    except Exception as error:
        raise CheckpointError(
            f"{source} cannot be loaded: {what_failed(error)}; give MODEL/PRETRAINED of open_clip.list_pretrained(), "
            "MODEL/FILE, hf-hub:ORG/NAME or local-dir:FOLDER"
        ) from error
    return open_clip_tower(model.visual, source)


def open_clip_tower(module: Any, source: str) -> StockTower:
    """Return the ``visual`` of an open_clip model as a tower; one that is timm's is read as such.

    Args:
        module: ``VisionTransformer`` or ``TimmModel`` of open_clip.
        source: where it comes from; errors start with it.

    Raises:
        CheckpointError: our tower cannot hold it exactly; the message says what it has that ours has not.
    """
    known = stock_library("open_clip.transformer")
    if hasattr(module, "trunk"):
        return timm_tower(module.trunk, source)
    if type(module) is not known.VisionTransformer:
        raise CheckpointError(
            f"{source} has a {type(module).__name__}; only open_clip's VisionTransformer has our layers"
        )
    module = module.eval().float()
    block = module.transformer.resblocks[0]
    state = {name: value for name, value in module.state_dict().items() if not name.startswith(_HEADS)}
    require_fit(
        {
            "no LayerNorm before the first layer (ln_pre)": not isinstance(module.ln_pre, nn.LayerNorm),
            "an attention pool before its last LayerNorm (attn_pool)": module.attn_pool is not None,
            "images or patches that are not square": len({*module.image_size}) + len({*module.patch_size}) > 2,
            f"layers of type {type(block).__name__}": type(block) is not known.ResidualAttentionBlock,
        },
        source,
    )
    vision = VisionConfig(
        image_size=module.image_size[0],
        patch_size=module.patch_size[0],
        num_layers=len(module.transformer.resblocks),
        hidden_size=module.conv1.out_channels,
        ffn_hidden_size=block.mlp.c_fc.out_features,
        num_attention_heads=block.attn.num_heads,
        class_token=True,
        layer_scale_init=VisionConfig.layer_scale_init if hasattr(block.ls_1, "gamma") else None,
        drop_path_rate=0.0,
        layernorm_epsilon=layernorm_epsilon(module),
        activation=activation_name(block.mlp.gelu),
    )

    def features(images: Tensor) -> Tensor:
        # The library returns tokens before the last LayerNorm where that comes after its pool.
        tokens: Tensor = module.ln_post(module.transformer(module._embeds(images)))
        return tokens[:, 1:]

    return StockTower("open_clip", vision, open_clip_table(vision), state, features)
