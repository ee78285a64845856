"""The vision tower as transformers' ``CLIPVisionModel``: what LLaVA reads; needs neither timm nor torchvision.

CLIP has no LayerScale: it is multiplied into the linear layer before it, which computes the same but for rounding of
the last bit, and cannot be undone. Fine-tuning then starts from another parametrisation: prefer timm for that.
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
from lcl_megatron.config import RunConfig
from lcl_megatron.config.image import CLIP_MEAN, CLIP_STD

_LAYER = LayerNames(
    attention_norm="layer_norm1",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.out_proj",
    mlp_norm="layer_norm2",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
_SCALED = {"self_attn_bda.gamma": "self_attention.linear_proj", "mlp_bda.gamma": "mlp.linear_fc2"}
"""LayerScale -> the linear layer whose output it multiplies."""


def refusal(config: RunConfig) -> str | None:
    """Return why CLIPVisionModel cannot hold the tower, or None if it can."""
    if not config.vision.class_token:
        return "CLIPVisionModel has a class token; vision.class_token = False"
    return None


def table(config: RunConfig) -> Table:
    """Return the rules of the vision tower without LayerScale."""
    vision = config.vision
    embeddings = "vision_model.embeddings"
    return (
        Rule("vision.embedding.weight", (f"{embeddings}.patch_embedding.weight",)),
        Rule("vision.embedding.class_token", (f"{embeddings}.class_embedding",)),
        Rule("vision.embedding.position_embeddings", (f"{embeddings}.position_embedding.weight",)),
        *affine("vision.embedding.layernorm", "vision_model.pre_layrnorm"),
        *layer_rules(
            "vision.layers", "vision_model.encoder.layers", vision.num_layers, vision.num_attention_heads, _LAYER
        ),
        *affine("vision.final_layernorm", "vision_model.post_layernorm"),
    )


def fold_layer_scale(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the vision tower's state with every LayerScale multiplied into the linear layer before it.

    Args:
        state: tensors under our names; products are taken in float32.
    """
    folded = {name: tensor for name, tensor in state.items() if name.startswith("vision.")}
    for name in list(folded):
        for scale, linear in _SCALED.items():
            if name.endswith(scale):
                gamma, layer = folded.pop(name).float(), name.removesuffix(scale)
                for leaf in ("weight", "bias"):
                    tensor = folded[f"{layer}{linear}.{leaf}"]
                    shape = (-1, *[1] * (tensor.dim() - 1))
                    folded[f"{layer}{linear}.{leaf}"] = (gamma.view(shape) * tensor.float()).to(tensor.dtype)
    return folded


def to_clip_vision(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return CLIPVisionModel's tensors of the vision tower, LayerScale folded; see ``table.export_tensors``."""
    return export_tensors(table(config), fold_layer_scale(state))


def from_clip_vision(tensors: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return CLIPVisionModel's tensors under our names (``vision.*``), a tower without LayerScale.

    See ``table.import_tensors``; ``config`` may have LayerScale, its parameters are then not in the result.
    """
    return import_tensors(table(config), tensors)


def config_json(config: RunConfig) -> dict[str, Any]:
    """Return ``config.json`` of the folder."""
    vision = config.vision
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
        "hidden_act": vision.activation,
        "layer_norm_eps": vision.layernorm_epsilon,
        "attention_dropout": 0.0,
        "projection_dim": vision.hidden_size,
    }


def preprocessor_json(config: RunConfig) -> dict[str, Any]:
    """Return ``preprocessor_config.json``: OpenCLIP's transform for evaluation."""
    size = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
