"""Names and layouts of the released LCL code (open_clip format), both ways.

| here | released code |
|---|---|
| ``vision.embedding.*``, ``vision.layers.N``, ``vision.final_layernorm`` | ``visual.*`` |
| ``pool.*`` | ``pool_project.*`` |
| ``language.embedding.*``, ``language.layers.N`` | ``text.*`` |
| ``language.heads.final_layernorm``, ``language.output_projection.weight`` | ``lm_head.0``, ``lm_head.1`` |
| ``language.heads.context_layernorm``, ``.context_projection`` | ``text.ln_final``, ``text.text_projection`` |

Every map is a permutation of entries, so it serves weights and gradients alike and is bit-exact both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lcl_megatron.config import RunConfig

Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """One parameter: its two names and how its entries are laid out in each."""

    ours: str
    """Name in ``LCLModel``."""
    official: str
    """Name in the released code."""
    to_ours: Layout = lambda tensor: tensor
    """From the released layout to ours."""
    to_official: Layout = lambda tensor: tensor
    """From our layout to the released one."""


def interleave_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """Turn rows [q of all heads; k; v] into megatron-core's [head][q, k, v]; weight or bias, 3 C rows."""
    return tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).reshape(tensor.shape)


def split_qkv(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo ``interleave_qkv``."""
    return tensor.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).reshape(tensor.shape)


def name_table(config: RunConfig) -> tuple[Entry, ...]:
    """Return one entry for every parameter of a model of the ``official`` recipe."""
    vision, language = config.vision, config.language
    entries = [
        Entry("vision.embedding.weight", "visual.conv1.weight"),
        Entry("vision.embedding.class_token", "visual.class_embedding"),
        Entry("vision.embedding.position_embeddings", "visual.positional_embedding"),
        *_affine("vision.embedding.layernorm", "visual.ln_pre"),
        *_layers("vision.layers", "visual.transformer.resblocks", vision.num_layers, vision.num_attention_heads),
        *_affine("vision.final_layernorm", "visual.ln_post"),
        Entry(
            "pool.query",
            "pool_project.query_token",
            lambda tensor: tensor.flatten(),
            lambda tensor: tensor.view(1, 1, -1),
        ),
        Entry("pool.output_projection.weight", "pool_project.pooler.cross_attn.proj.weight"),
        Entry("language.embedding.word_embeddings.weight", "text.token_embedding.weight"),
        Entry("language.embedding.position_embeddings", "text.positional_embedding"),
        *_layers("language.layers", "text.transformer.resblocks", language.num_layers, language.num_attention_heads),
        *_affine("language.heads.context_layernorm", "text.ln_final"),
        Entry(
            "language.heads.context_projection.weight",
            "text.text_projection",
            lambda tensor: tensor.t(),
            lambda tensor: tensor.t(),
        ),
        *_affine("language.heads.final_layernorm", "lm_head.0"),
        Entry("language.output_projection.weight", "lm_head.1.weight"),
        Entry("logit_scale", "logit_scale", lambda tensor: tensor.view(1), lambda tensor: tensor.view(())),
    ]
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        pooler = "pool_project.pooler"
        entries += _affine(f"pool.{word}_layernorm", f"{pooler}.norm1_{letter}")
        entries.append(Entry(f"pool.{word}_projection.weight", f"{pooler}.cross_attn.{letter}.weight"))
        entries.append(Entry(f"pool.{word}_projection.bias", f"{pooler}.cross_attn.{letter}_bias"))
    return tuple(entries)


def _affine(ours: str, official: str) -> list[Entry]:
    return [Entry(f"{ours}.{leaf}", f"{official}.{leaf}") for leaf in ("weight", "bias")]


def _layers(ours: str, official: str, num_layers: int, num_heads: int) -> list[Entry]:
    entries = []
    for index in range(num_layers):
        here, there = f"{ours}.{index}", f"{official}.{index}"
        entries += _affine(f"{here}.input_layernorm", f"{there}.ln_1")
        entries += _affine(f"{here}.self_attention.linear_proj", f"{there}.attn.out_proj")
        entries += _affine(f"{here}.pre_mlp_layernorm", f"{there}.ln_2")
        entries += _affine(f"{here}.mlp.linear_fc1", f"{there}.mlp.c_fc")
        entries += _affine(f"{here}.mlp.linear_fc2", f"{there}.mlp.c_proj")
        for leaf in ("weight", "bias"):
            entries.append(
                Entry(
                    f"{here}.self_attention.linear_qkv.{leaf}",
                    f"{there}.attn.in_proj_{leaf}",
                    lambda tensor: interleave_qkv(tensor, num_heads),
                    lambda tensor: split_qkv(tensor, num_heads),
                )
            )
    return entries


def from_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return a released state dict under our names.

    Raises:
        ValueError: the two sets of names differ, so that a weight would be lost or stay random.
    """
    table = name_table(config)
    _check_names(state, {entry.official for entry in table})
    return {entry.ours: entry.to_ours(state[entry.official]).contiguous() for entry in table}


def to_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return our state dict, or gradients under the same names, under the released names.

    Raises:
        ValueError: the two sets of names differ.
    """
    table = name_table(config)
    _check_names(state, {entry.ours for entry in table})
    return {entry.official: entry.to_official(state[entry.ours]).contiguous() for entry in table}


def _check_names(state: Mapping[str, Tensor], expected: set[str]) -> None:
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"the state dict lacks {missing or 'nothing'} and has unknown {unknown or 'nothing'}; "
            "it is not of the `official` recipe with this configuration"
        )
