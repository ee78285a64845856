"""The language model as transformers' ``OPTForCausalLM``.

Exact, but for two additions and one omission: OPT keeps two rows in front of its positions, which are zero here and
never read; rows of the vocabulary that only pad it to a multiple are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

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
from lcl_megatron.data.tokenizer import SpecialTokens

POSITION_OFFSET = 2
"""OPT reads row ``position + 2`` of its position embeddings."""
_EPSILON = 1e-5
_LAYER = LayerNames(
    attention_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    fc1="fc1",
    fc2="fc2",
)
_EMBEDDING, _HEAD = "model.decoder.embed_tokens.weight", "lm_head.weight"


def refusal(config: RunConfig) -> str | None:
    """Return why OPTForCausalLM cannot hold the language model, or None if it can."""
    epsilon = config.language.layernorm_epsilon
    if epsilon != _EPSILON:
        return f"OPT's LayerNorms have epsilon {_EPSILON}; language.layernorm_epsilon = {epsilon}"
    return None


def table(config: RunConfig, write_tied_head: bool = False) -> Table:
    """Return the rules of the language model.

    Args:
        config: the run.
        write_tied_head: keep a tied output matrix under its own name too, for readers that do not tie.
    """
    language = config.language
    vocab, padded = language.vocab_size, language.padded_vocab_size

    def without_padding(tensor: Tensor) -> list[Tensor]:
        return [tensor[:vocab]]

    def with_padding(tensors: Sequence[Tensor]) -> Tensor:
        return pad(tensors[0], (0, 0, 0, padded - vocab))

    if language.tie_embeddings and write_tied_head:
        embedding = [
            Rule(
                "language.embedding.word_embeddings.weight",
                (_EMBEDDING, _HEAD),
                lambda tensor: [tensor[:vocab], tensor[:vocab]],
                with_padding,
            )
        ]
    else:
        embedding = [Rule("language.embedding.word_embeddings.weight", (_EMBEDDING,), without_padding, with_padding)]
    if not language.tie_embeddings:
        embedding.append(Rule("language.output_projection.weight", (_HEAD,), without_padding, with_padding))
    return (
        *embedding,
        Rule(
            "language.embedding.position_embeddings",
            ("model.decoder.embed_positions.weight",),
            lambda tensor: [pad(tensor, (0, 0, POSITION_OFFSET, 0))],
            lambda tensors: tensors[0][POSITION_OFFSET:],
        ),
        *layer_rules(
            "language.layers", "model.decoder.layers", language.num_layers, language.num_attention_heads, _LAYER
        ),
        *affine("language.heads.final_layernorm", "model.decoder.final_layer_norm"),
    )


def to_opt(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return OPTForCausalLM's tensors of the language model; see ``table.export_tensors``."""
    return export_tensors(table(config), state)


def from_opt(tensors: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return OPTForCausalLM's tensors under our names (``language.*`` without the contrastive head).

    Rows that pad the vocabulary are zero. See ``table.import_tensors``.
    """
    return import_tensors(table(config), tensors)


def config_json(config: RunConfig, special: SpecialTokens | None) -> dict[str, Any]:
    """Return ``config.json`` of the folder.

    Args:
        config: the run.
        special: ids of the tokenizer's special tokens; None = unknown, ids are then left unset.
    """
    language = config.language
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": language.vocab_size,
        "hidden_size": language.hidden_size,
        "word_embed_proj_dim": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "ffn_dim": language.ffn_hidden_size,
        "num_attention_heads": language.num_attention_heads,
        "max_position_embeddings": language.max_position_embeddings,
        "activation_function": language.activation,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
        "tie_word_embeddings": language.tie_embeddings,
        **token_ids(special),
    }


def token_ids(special: SpecialTokens | None) -> dict[str, int | None]:
    """Return the ids that ``config.json`` and ``generation_config.json`` name."""
    # Written also when unknown: OPT's defaults are ids of other tokens here.
    return {
        "bos_token_id": special.bos if special else None,
        "eos_token_id": special.eos if special else None,
        "pad_token_id": special.pad if special else None,
    }
