"""The vision tower as a timm Vision Transformer, in a folder that timm and transformers' ``AutoModel`` both open.

Exact: names and shapes change, values do not; LayerScale and drop-path stay what they are.
timm's ``*_clip_*`` architectures have what the tower has: a LayerNorm before the first layer, no bias in the patch
embedding, erf-GELU, epsilon 1e-5. A tower of another size is such an architecture with its arguments overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lcl_megatron.checkpoint.convert.table import (
    LayerNames,
    Rule,
    Table,
    affine,
    export_tensors,
    import_tensors,
    layer_rules,
)
from lcl_megatron.config import RunConfig, VisionConfig
from lcl_megatron.config.image import CLIP_MEAN, CLIP_STD

_CLIP_ARCHITECTURES = {
    # (patch size, image size, width, layers, heads, MLP width)
    (16, 224, 512, 12, 8, 2048): "vit_medium_patch16_clip_224",
    (32, 224, 768, 12, 12, 3072): "vit_base_patch32_clip_224",
    (16, 224, 768, 12, 12, 3072): "vit_base_patch16_clip_224",
    (16, 384, 768, 12, 12, 3072): "vit_base_patch16_clip_384",
    (14, 224, 1024, 24, 16, 4096): "vit_large_patch14_clip_224",
    (14, 336, 1024, 24, 16, 4096): "vit_large_patch14_clip_336",
    (14, 224, 1280, 32, 16, 5120): "vit_huge_patch14_clip_224",
    (14, 336, 1280, 32, 16, 5120): "vit_huge_patch14_clip_336",
}
_ANY_SIZE = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
"""Architecture to override for other sizes, by the epsilon of its LayerNorms, which no argument in JSON can change."""


def refusal(config: RunConfig) -> str | None:
    """Return why timm cannot hold the tower, or None if it can."""
    epsilon = config.vision.layernorm_epsilon
    if epsilon not in _ANY_SIZE:
        known = " or ".join(map(str, _ANY_SIZE))
        return f"timm's Vision Transformers have LayerNorms of epsilon {known}; vision.layernorm_epsilon = {epsilon}"
    return None


def table(config: RunConfig) -> Table:
    """Return the rules of the vision tower."""
    vision = config.vision
    scales = None if vision.layer_scale_init is None else ("ls1.gamma", "ls2.gamma")
    names = LayerNames("norm1", ("attn.qkv",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", scales)
    class_token = Rule(
        "vision.embedding.class_token",
        ("cls_token",),
        lambda tensor: [tensor[None, None]],
        lambda tensors: tensors[0][0, 0],
    )
    return (
        Rule("vision.embedding.weight", ("patch_embed.proj.weight",)),
        *([class_token] if vision.class_token else []),
        Rule(
            "vision.embedding.position_embeddings",
            ("pos_embed",),
            lambda tensor: [tensor[None]],
            lambda tensors: tensors[0][0],
        ),
        *affine("vision.embedding.layernorm", "norm_pre"),
        *layer_rules("vision.layers", "blocks", vision.num_layers, vision.num_attention_heads, names),
        *affine("vision.final_layernorm", "norm"),
    )


def to_timm(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return timm's state dict of the vision tower; see ``table.export_tensors``."""
    return export_tensors(table(config), state)


def from_timm(tensors: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return a timm state dict under our names (``vision.*``); see ``table.import_tensors``."""
    return import_tensors(table(config), tensors)


def config_json(config: RunConfig) -> dict[str, Any]:
    """Return ``config.json`` of a folder for ``AutoModel.from_pretrained`` and ``timm.create_model("local-dir:...")``.

    Without a head, timm pools by the mean over patches, as the probes of this package do: nothing trains the class
    token's output.
    """
    vision = config.vision
    architecture, arguments = architecture_of(vision)
    size = [3, vision.image_size, vision.image_size]
    return {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        "architecture": architecture,
        "num_classes": 0,
        "num_features": vision.hidden_size,
        "global_pool": "avg",
        "do_pooling": False,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "lcl",
            "architecture": architecture,
            "input_size": size,
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def architecture_of(vision: VisionConfig) -> tuple[str, dict[str, Any]]:
    """Return timm's name of the architecture, and the arguments with which it is this tower.

    Raises:
        KeyError: ``refusal`` has a reason.
    """
    arguments: dict[str, Any] = {"class_token": vision.class_token, "global_pool": "avg", "fc_norm": False}
    if vision.layer_scale_init is not None:
        arguments["init_values"] = vision.layer_scale_init
    if vision.activation != "gelu":
        arguments["act_layer"] = vision.activation
    shape = (
        vision.patch_size,
        vision.image_size,
        vision.hidden_size,
        vision.num_layers,
        vision.num_attention_heads,
        vision.ffn_hidden_size,
    )
    if vision.layernorm_epsilon == 1e-5 and shape in _CLIP_ARCHITECTURES:
        return _CLIP_ARCHITECTURES[shape], arguments
    arguments |= {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.hidden_size,
        "depth": vision.num_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": _mlp_ratio(vision),
        "pre_norm": True,
    }
    return _ANY_SIZE[vision.layernorm_epsilon], arguments


def _mlp_ratio(vision: VisionConfig) -> float:
    """Return the ratio from which timm, which multiplies and rounds down, finds the MLP's width."""
    ratio = vision.ffn_hidden_size / vision.hidden_size
    if int(vision.hidden_size * ratio) < vision.ffn_hidden_size:
        ratio = (vision.ffn_hidden_size + 0.5) / vision.hidden_size
    return ratio
