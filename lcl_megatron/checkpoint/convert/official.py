"""Names and layouts of the released LCL code (open_clip format), both ways.

| here | released code |
|---|---|
| ``vision.embedding.*``, ``vision.layers.N``, ``vision.final_layernorm`` | ``visual.*`` |
| ``pool.*`` | ``pool_project.*`` |
| ``language.embedding.*``, ``language.layers.N`` | ``text.*`` |
| ``language.heads.final_layernorm``, ``language.output_projection.weight`` | ``lm_head.0``, ``lm_head.1`` |
| ``language.heads.context_layernorm``, ``.context_projection`` | ``text.ln_final``, ``text.text_projection`` |

The vocabulary is padded here (``language.make_vocab_size_divisible_by``) and not there: padded rows are zero here and
left out there. Every other map is a permutation of entries, so that the released weights survive bit by bit both ways.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.checkpoint.convert.encoder import OPEN_CLIP, OPEN_CLIP_LAYER, encoder_table, layer_entries
from lcl_megatron.checkpoint.convert.entries import Entry, affine, interleave_qkv, split_qkv, to_ours, to_theirs
from lcl_megatron.config import LanguageConfig, RunConfig

__all__ = ["Entry", "from_official", "interleave_qkv", "name_table", "split_qkv", "to_official"]


def name_table(config: RunConfig) -> tuple[Entry, ...]:
    """Return one entry for every parameter of a model of the ``official`` recipe, with LayerScale if it has it."""
    language = config.language
    entries = [
        *encoder_table(OPEN_CLIP, config.vision, "visual."),
        Entry(
            "pool.query",
            "pool_project.query_token",
            lambda tensor: tensor.flatten(),
            lambda tensor: tensor.view(1, 1, -1),
        ),
        Entry("pool.output_projection.weight", "pool_project.pooler.cross_attn.proj.weight"),
        _vocabulary_entry("language.embedding.word_embeddings.weight", "text.token_embedding.weight", language),
        Entry("language.embedding.position_embeddings", "text.positional_embedding"),
        *affine("language.heads.context_layernorm", "text.ln_final"),
        Entry(
            "language.heads.context_projection.weight",
            "text.text_projection",
            lambda tensor: tensor.t(),
            lambda tensor: tensor.t(),
        ),
        *affine("language.heads.final_layernorm", "lm_head.0"),
        _vocabulary_entry("language.output_projection.weight", "lm_head.1.weight", language),
        Entry("logit_scale", "logit_scale", lambda tensor: tensor.view(1), lambda tensor: tensor.view(())),
    ]
    for index in range(language.num_layers):
        entries += layer_entries(
            f"language.layers.{index}",
            f"text.transformer.resblocks.{index}",
            OPEN_CLIP_LAYER,
            language.num_attention_heads,
        )
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        pooler = "pool_project.pooler"
        entries += affine(f"pool.{word}_layernorm", f"{pooler}.norm1_{letter}")
        entries.append(Entry(f"pool.{word}_projection.weight", f"{pooler}.cross_attn.{letter}.weight"))
        entries.append(Entry(f"pool.{word}_projection.bias", f"{pooler}.cross_attn.{letter}_bias"))
    return tuple(entries)


def _vocabulary_entry(ours: str, theirs: str, language: LanguageConfig) -> Entry:
    """Return the entry of a matrix with one row for every token id."""
    return Entry(
        ours,
        theirs,
        lambda tensor: F.pad(tensor, (0, 0, 0, language.padded_vocab_size - tensor.shape[0])),
        lambda tensor: tensor[: language.vocab_size],
    )


def from_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return a released state dict under our names.

    Raises:
        ConversionError: the two sets of names differ, so that a weight would be lost or stay random.
    """
    return to_ours(name_table(config), state)


def to_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return our state dict, or gradients under the same names, under the released names.

    Raises:
        ConversionError: the two sets of names differ.
    """
    return to_theirs(name_table(config), state)
