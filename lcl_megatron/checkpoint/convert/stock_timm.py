"""Vision towers of timm: ``vit_*_clip_*`` of the hub, or a local folder, as our tower."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lcl_megatron.checkpoint.convert import timm_vit
from lcl_megatron.checkpoint.convert.stock_tower import (
    StockTower,
    activation_name,
    layernorm_epsilon,
    require_fit,
)
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.refused_pickles import what_failed
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.config import RunConfig, VisionConfig

_HEADS = ("head.", "fc_norm.", "attn_pool.")
"""What stands behind the tower: classifiers and pools."""


def load_timm(name: str) -> StockTower:
    """Load a tower with ``timm.create_model``.

    Args:
        name: a model with its tag (``vit_base_patch16_clip_224.laion2b``), ``hf-hub:ORG/NAME`` or ``local-dir:PATH``.

    Raises:
        CheckpointError: timm has no such model or cannot load it, or our tower cannot hold it exactly.
        LibraryError: timm is not installed.
    """
    timm = stock_library("timm")
    try:
        module = timm.create_model(name, pretrained=True)
    # What hub, file or name may be wrong raises nearly anything.
    except Exception as error:
        raise CheckpointError(
            f"timm:{name} cannot be loaded: {what_failed(error)}; give a pretrained model of timm.list_pretrained() or "
            "timm:local-dir:FOLDER"
        ) from error
    return timm_tower(module, f"timm:{name}")


def timm_tower(module: Any, source: str) -> StockTower:
    """Return a timm model as a tower.

    Args:
        module: a ``VisionTransformer`` of timm.
        source: where it comes from; errors start with it.

    Raises:
        CheckpointError: our tower cannot hold it exactly; the message says what it has that ours has not.
    """
    known = stock_library("timm.models.vision_transformer")
    if type(module) is not known.VisionTransformer:
        raise CheckpointError(f"{source} is a {type(module).__name__}; only timm's VisionTransformer has our layers")
    module = module.eval().float()
    block, patches = module.blocks[0], module.patch_embed
    state = {name: value for name, value in module.state_dict().items() if not name.startswith(_HEADS)}
    class_token = module.cls_token is not None
    require_fit(
        {
            "no LayerNorm before the first layer (norm_pre)": not isinstance(module.norm_pre, nn.LayerNorm),
            "no LayerNorm after the last layer (norm)": not isinstance(module.norm, nn.LayerNorm),
            "a bias on the patch projection (patch_embed.proj.bias)": patches.proj.bias is not None,
            "register tokens (reg_token)": module.num_reg_tokens > 0,
            "no learned positions (pos_embed)": module.pos_embed is None,
            "no position of the class token (no_embed_class)": class_token and module.no_embed_class,
            "images or patches that are not square": len({*patches.img_size}) + len({*patches.patch_size}) > 2,
            f"layers of type {type(block).__name__}": type(block) is not known.Block,
        },
        source,
    )
    vision = VisionConfig(
        image_size=patches.img_size[0],
        patch_size=patches.patch_size[0],
        num_layers=len(module.blocks),
        hidden_size=module.embed_dim,
        ffn_hidden_size=block.mlp.fc1.out_features,
        num_attention_heads=block.attn.num_heads,
        class_token=class_token,
        layer_scale_init=VisionConfig.layer_scale_init if "blocks.0.ls1.gamma" in state else None,
        drop_path_rate=0.0,
        layernorm_epsilon=layernorm_epsilon(module.blocks),
        activation=activation_name(block.mlp.act),
    )

    notes = (getattr(module, "pretrained_cfg", None) or {}).get("notes") or ()
    if vision.activation == "gelu" and any("QuickGELU" in note for note in notes):
        raise CheckpointError(
            f"{source}: its weights were trained with QuickGELU, and this model of timm runs them with GELU, which "
            "changes every feature; take its quickgelu variant (vit_*_clip_quickgelu_*)"
        )

    def features(images: Tensor) -> Tensor:
        tokens: Tensor = module.forward_features(images)
        return tokens[:, int(class_token) :]

    return StockTower("timm", vision, timm_vit.table(RunConfig(vision=vision)), state, features)
