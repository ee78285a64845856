"""Names and layouts of the released LCL code and of open_clip, both ways.

| here | released code |
|---|---|
| ``vision.embedding.*``, ``vision.layers.N``, ``vision.final_layernorm`` | ``visual.*``, as in open_clip |
| ``pool.*`` | ``pool_project.*`` |
| ``language.embedding.*``, ``language.layers.N`` | ``text.*`` |
| ``language.heads.final_layernorm``, ``language.output_projection.weight`` | ``lm_head.0``, ``lm_head.1`` |
| ``language.heads.context_layernorm``, ``.context_projection`` | ``text.ln_final``, ``text.text_projection`` |

The vocabulary is padded here (``language.make_vocab_size_divisible_by``) and not there: padded rows are zero here and
left out there. Every other map is a permutation of entries, so that it serves weights and gradients alike, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.checkpoint.convert.table import (
    LayerNames,
    Rule,
    Table,
    affine,
    export_tensors,
    import_tensors,
    layer_rules,
    under,
)
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import LanguageConfig, RunConfig, VisionConfig

_LAYER = LayerNames("ln_1", ("attn.in_proj",), "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
_LAYER_SCALES = ("ls_1.gamma", "ls_2.gamma")


def open_clip_table(vision: VisionConfig) -> Table:
    """Return the rules of the vision tower in open_clip's ``VisionTransformer``, and in the released code."""
    layer = _LAYER if vision.layer_scale_init is None else replace(_LAYER, layer_scales=_LAYER_SCALES)
    return (
        Rule("vision.embedding.weight", ("conv1.weight",)),
        *([Rule("vision.embedding.class_token", ("class_embedding",))] if vision.class_token else []),
        Rule("vision.embedding.position_embeddings", ("positional_embedding",)),
        *affine("vision.embedding.layernorm", "ln_pre"),
        *_layers("vision.layers", vision.num_layers, vision.num_attention_heads, layer),
        *affine("vision.final_layernorm", "ln_post"),
    )


def name_table(config: RunConfig) -> Table:
    """Return the rules of every parameter of a model of the ``official`` recipe, with LayerScale if it has it."""
    language = config.language
    rules = [
        *under(open_clip_table(config.vision), "visual."),
        _reshaped("pool.query", "pool_project.query_token", (-1,), (1, 1, -1)),
        Rule("pool.output_projection.weight", ("pool_project.pooler.cross_attn.proj.weight",)),
        _vocabulary("language.embedding.word_embeddings.weight", "text.token_embedding.weight", language),
        Rule("language.embedding.position_embeddings", ("text.positional_embedding",)),
        *under(tuple(_layers("language.layers", language.num_layers, language.num_attention_heads, _LAYER)), "text."),
        *affine("language.heads.context_layernorm", "text.ln_final"),
        Rule(
            "language.heads.context_projection.weight",
            ("text.text_projection",),
            lambda tensor: [tensor.t()],
            lambda tensors: tensors[0].t(),
        ),
        *affine("language.heads.final_layernorm", "lm_head.0"),
        _vocabulary("language.output_projection.weight", "lm_head.1.weight", language),
        _reshaped("logit_scale", "logit_scale", (1,), ()),
    ]
    pooler = "pool_project.pooler"
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        rules += affine(f"pool.{word}_layernorm", f"{pooler}.norm1_{letter}")
        rules.append(Rule(f"pool.{word}_projection.weight", (f"{pooler}.cross_attn.{letter}.weight",)))
        rules.append(Rule(f"pool.{word}_projection.bias", (f"{pooler}.cross_attn.{letter}_bias",)))
    return tuple(rules)


def _layers(ours: str, num_layers: int, num_heads: int, names: LayerNames) -> Iterator[Rule]:
    for rule in layer_rules(ours, "transformer.resblocks", num_layers, num_heads, names):
        # Parameters of torch's MultiheadAttention itself, and not of a linear layer in it.
        yield replace(rule, theirs=tuple(name.replace(".in_proj.", ".in_proj_") for name in rule.theirs))


def _reshaped(ours: str, theirs: str, our_shape: tuple[int, ...], their_shape: tuple[int, ...]) -> Rule:
    return Rule(
        ours,
        (theirs,),
        lambda tensor: [tensor.reshape(their_shape)],
        lambda tensors: tensors[0].reshape(our_shape),
    )


def _vocabulary(ours: str, theirs: str, language: LanguageConfig) -> Rule:
    """Return the rule of a matrix with one row for every token id."""
    return Rule(
        ours,
        (theirs,),
        lambda tensor: [tensor[: language.vocab_size]],
        lambda tensors: F.pad(tensors[0], (0, 0, 0, language.padded_vocab_size - tensors[0].shape[0])),
    )


def from_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return a released state dict under our names.

    Raises:
        CheckpointError: the two sets of names differ, so that a weight would be lost or stay random.
    """
    return import_tensors(name_table(config), state)


def to_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return our state dict, or gradients under the same names, under the released names.

    Raises:
        CheckpointError: the two sets of names differ.
    """
    table = name_table(config)
    if unknown := sorted(state.keys() - {rule.ours for rule in table}):
        raise CheckpointError(f"the released code has no place for {', '.join(unknown)}")
    return export_tensors(table, state)
