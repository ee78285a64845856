"""A pre-norm Vision Transformer under the names of open_clip, timm and transformers; what fits our tower, and why not.

| here, ``vision.`` | open_clip and the released code, ``visual.`` | timm | transformers' CLIP, ``vision_model.`` |
|---|---|---|---|
| ``embedding.weight`` | ``conv1.weight`` | ``patch_embed.proj.weight`` | ``embeddings.patch_embedding.weight`` |
| ``embedding.layernorm`` | ``ln_pre`` | ``norm_pre`` | ``pre_layrnorm`` |
| ``layers.N`` | ``transformer.resblocks.N`` | ``blocks.N`` | ``encoder.layers.N`` |
| ``self_attn_bda.gamma``, ``mlp_bda.gamma`` | ``ls_1.gamma``, ``ls_2.gamma`` | ``ls1.gamma``, ... | none |
| ``final_layernorm`` | ``ln_post`` | ``norm`` | ``post_layernorm`` |

Our tower is CLIP's: LayerNorm before the first layer, patches projected without a bias, learned positions, one row of
them for the class token, a bias on every other matrix, LayerScale or none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lcl_megatron.checkpoint.convert.entries import ConversionError, Entry, affine, interleave_qkv, split_qkv
from lcl_megatron.config import VisionConfig


@dataclass(frozen=True)
class LayerNames:
    """What a library calls the parts of a layer."""

    attention_norm: str
    """LayerNorm before the attention."""
    qkv: str
    """Input projection of the attention, rows [q; k; v]; ``{}`` stands for ``weight`` or ``bias``."""
    attention_output: str
    """Output projection of the attention."""
    mlp_norm: str
    """LayerNorm before the MLP."""
    mlp: tuple[str, str]
    """The two matrices of the MLP."""
    layer_scale: tuple[str, str] = ("", "")
    """LayerScale of attention and MLP; empty = the library's layer has none."""


@dataclass(frozen=True)
class EncoderNames:
    """What a library calls the parts of a vision tower."""

    patches: str
    """Weight (C, 3, patch, patch) of the patch projection."""
    class_token: str
    """Class token."""
    positions: str
    """Position embeddings."""
    leading_dims: bool
    """Whether class token and positions are (1, 1, C) and (1, P, C), not (C,) and (P, C)."""
    first_norm: str
    """LayerNorm after the positions."""
    layers: str
    """What layers are under, without their index."""
    layer: LayerNames
    """Parts of a layer."""
    last_norm: str
    """LayerNorm after the layers."""


OPEN_CLIP_LAYER = LayerNames(
    "ln_1", "attn.in_proj_{}", "attn.out_proj", "ln_2", ("mlp.c_fc", "mlp.c_proj"), ("ls_1.gamma", "ls_2.gamma")
)
OPEN_CLIP = EncoderNames(
    patches="conv1.weight",
    class_token="class_embedding",
    positions="positional_embedding",
    leading_dims=False,
    first_norm="ln_pre",
    layers="transformer.resblocks",
    layer=OPEN_CLIP_LAYER,
    last_norm="ln_post",
)
TIMM = EncoderNames(
    patches="patch_embed.proj.weight",
    class_token="cls_token",
    positions="pos_embed",
    leading_dims=True,
    first_norm="norm_pre",
    layers="blocks",
    layer=LayerNames("norm1", "attn.qkv.{}", "attn.proj", "norm2", ("mlp.fc1", "mlp.fc2"), ("ls1.gamma", "ls2.gamma")),
    last_norm="norm",
)
CLIP = EncoderNames(
    patches="embeddings.patch_embedding.weight",
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding.weight",
    leading_dims=False,
    first_norm="pre_layrnorm",
    layers="encoder.layers",
    layer=LayerNames(
        "layer_norm1",
        "self_attn.qkv_proj.{}",
        "self_attn.out_proj",
        "layer_norm2",
        ("mlp.fc1", "mlp.fc2"),
    ),
    last_norm="post_layernorm",
)
"""With q, k and v of each layer as one tensor: see ``initial_clip.join_projections``."""


@dataclass(frozen=True)
class StockEncoder:
    """A vision tower of another library, with its weights."""

    library: str
    """``timm``, ``open_clip``, ``clip``."""
    names: EncoderNames
    """What the library calls its parts."""
    vision: VisionConfig
    """The tower of ours that is the same function."""
    state: Mapping[str, Tensor]
    """float32 parameters of the tower by those names, without pooling and heads."""
    features: Callable[[Tensor], Tensor]
    """From normalised images (N, 3, H, W) to what the library's own code computes: the last LayerNorm's output at the
    patches, (N, P, C)."""


def encoder_table(names: EncoderNames, vision: VisionConfig, prefix: str = "") -> list[Entry]:
    """Return one entry for every parameter of a vision tower.

    Args:
        names: the library's names.
        vision: the tower.
        prefix: what stands before the library's names, with its dot.
    """
    dims = (1,) if names.leading_dims else ()
    entries = [
        Entry("vision.embedding.weight", prefix + names.patches),
        _with_leading_dims("vision.embedding.position_embeddings", prefix + names.positions, dims),
        *affine("vision.embedding.layernorm", prefix + names.first_norm),
        *affine("vision.final_layernorm", prefix + names.last_norm),
    ]
    if vision.class_token:
        entries.append(_with_leading_dims("vision.embedding.class_token", prefix + names.class_token, 2 * dims))
    for index in range(vision.num_layers):
        there = f"{prefix}{names.layers}.{index}"
        entries += layer_entries(f"vision.layers.{index}", there, names.layer, vision.num_attention_heads)
        if vision.layer_scale_init is not None:
            for branch, leaf in zip(("self_attn_bda", "mlp_bda"), names.layer.layer_scale, strict=True):
                entries.append(Entry(f"vision.layers.{index}.{branch}.gamma", f"{there}.{leaf}"))
    return entries


def layer_entries(ours: str, theirs: str, names: LayerNames, num_heads: int) -> list[Entry]:
    """Return the entries of one layer's LayerNorms and matrices; the names of the two layers come first."""
    entries = [
        *affine(f"{ours}.input_layernorm", f"{theirs}.{names.attention_norm}"),
        *affine(f"{ours}.self_attention.linear_proj", f"{theirs}.{names.attention_output}"),
        *affine(f"{ours}.pre_mlp_layernorm", f"{theirs}.{names.mlp_norm}"),
        *affine(f"{ours}.mlp.linear_fc1", f"{theirs}.{names.mlp[0]}"),
        *affine(f"{ours}.mlp.linear_fc2", f"{theirs}.{names.mlp[1]}"),
    ]
    for leaf in ("weight", "bias"):
        entries.append(
            Entry(
                f"{ours}.self_attention.linear_qkv.{leaf}",
                f"{theirs}.{names.qkv.format(leaf)}",
                lambda tensor: interleave_qkv(tensor, num_heads),
                lambda tensor: split_qkv(tensor, num_heads),
            )
        )
    return entries


def _with_leading_dims(ours: str, theirs: str, dims: tuple[int, ...]) -> Entry:
    skip = len(dims)
    return Entry(
        ours,
        theirs,
        lambda tensor: tensor.reshape(tensor.shape[skip:]),
        lambda tensor: tensor.reshape(*dims, *tensor.shape),
    )


def activation_name(activation: Callable[[Tensor], Tensor]) -> Literal["gelu", "quick_gelu"]:
    """Return the value of ``vision.activation`` for a library's activation, told by what it computes.

    Raises:
        ConversionError: it is neither of ours; the nearest other, GELU by tanh, would cost 6e-4 of the features.
    """
    probe = torch.linspace(-6, 6, 97)
    found = activation(probe)
    if torch.allclose(found, nn.functional.gelu(probe), rtol=0, atol=1e-6):
        return "gelu"
    if torch.allclose(found, probe * torch.sigmoid(1.702 * probe), rtol=0, atol=1e-6):
        return "quick_gelu"
    raise ConversionError(
        f"the tower's activation is {activation}; ours are erf-GELU (gelu) and x * sigmoid(1.702 x) (quick_gelu)"
    )


def layernorm_epsilon(tower: nn.Module) -> float:
    """Return the epsilon that all LayerNorms of a tower share.

    Raises:
        ConversionError: it has none, or they differ.
    """
    found = sorted({module.eps for module in tower.modules() if isinstance(module, nn.LayerNorm)})
    if len(found) != 1:
        raise ConversionError(f"the tower's LayerNorms have the epsilons {found or 'none'}; ours has one for all")
    return found[0]


def require_fit(reasons: Mapping[str, bool], source: str) -> None:
    """Raise ConversionError naming every reason that holds; each says what our tower does not have."""
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        listed = "\n  ".join(found)
        raise ConversionError(
            f"{source}: our vision tower cannot hold it exactly:\n  {listed}\nWhat fits: CLIP's towers, such as timm's "
            "vit_*_clip_*, open_clip's ViT-* and transformers' CLIPVisionModel"
        )
