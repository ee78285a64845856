"""Every parameter of a pipeline stage on one rank, without building it.

Names, order and shapes are those of the built model with the ``torch`` layers; a test compares the two. The order
matters because megatron-core fills its gradient buckets in it. TransformerEngine's layers hold the same parameters in
another order, so that a border between two buckets may lie elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lcl_megatron.config import LanguageConfig, RunConfig, VisionConfig
from lcl_megatron.model.line import HEADS, LANGUAGE_EMBED, POOL, VISION_EMBED, Stage


@dataclass(frozen=True)
class Parameter:
    """One parameter, as one tensor-parallel rank holds it."""

    name: str
    """Name in the stage's model."""
    shape: tuple[int, ...]
    """Shape on one rank."""
    is_float32: bool = False
    """Kept in float32 whatever the precision of the run."""
    sequence_parallel: bool = False
    """Under sequence parallelism its gradient is summed over the tensor-parallel ranks."""
    shared_embedding: bool = False
    """One of two copies of the tied matrix on different stages: it has a bucket of its own."""

    @cached_property
    def numel(self) -> int:
        """Elements on one rank."""
        return math.prod(self.shape)


def stage_parameters(config: RunConfig, stage: Stage) -> tuple[Parameter, ...]:
    """Return the parameters of a stage on one tensor-parallel rank, in the order of ``named_parameters``.

    Args:
        config: the run; ``language.vocab_size`` must be known where the stage holds the token table.
        stage: pieces of the line.
    """
    return tuple(_parameters(config, stage))


def _parameters(config: RunConfig, stage: Stage) -> Iterator[Parameter]:
    language, tp = config.language, config.parallel.tensor_model_parallel_size
    if stage.has(HEADS):
        yield Parameter("logit_scale", (1,), is_float32=True)
    if stage.has(VISION_EMBED):
        yield from _patch_embedding(config.vision)
    for index in stage.layers("vision"):
        yield from _vision_layer(config.vision, f"vision.layers.{index}", tp)
    if stage.has(POOL):
        yield from _layernorm("vision.final_layernorm", config.vision.hidden_size)
        yield from _pool(config.vision.hidden_size, language.hidden_size)
    is_cut = language.tie_embeddings and stage.has(LANGUAGE_EMBED) != stage.has(HEADS)
    if stage.has(LANGUAGE_EMBED):
        positions = (language.max_position_embeddings, language.hidden_size)
        yield Parameter("language.embedding.position_embeddings", positions)
        table = (language.padded_vocab_size // tp, language.hidden_size)
        yield Parameter("language.embedding.word_embeddings.weight", table, shared_embedding=is_cut)
    for index in stage.layers("language"):
        yield from _language_layer(language, f"language.layers.{index}", tp)
    if stage.has(HEADS):
        yield from _heads(language)
        if not (language.tie_embeddings and stage.has(LANGUAGE_EMBED)):
            table = (language.padded_vocab_size // tp, language.hidden_size)
            yield Parameter("language.output_projection.weight", table, shared_embedding=is_cut)


def _patch_embedding(vision: VisionConfig) -> Iterator[Parameter]:
    width, name = vision.hidden_size, "vision.embedding"
    yield Parameter(f"{name}.weight", (width, 3, vision.patch_size, vision.patch_size))
    if vision.class_token:
        yield Parameter(f"{name}.class_token", (width,))
    yield Parameter(f"{name}.position_embeddings", (vision.num_tokens, width))
    yield from _layernorm(f"{name}.layernorm", width)


def _vision_layer(vision: VisionConfig, name: str, tp: int) -> Iterator[Parameter]:
    width = vision.hidden_size
    scales = vision.layer_scale_init is not None
    yield from _layernorm(f"{name}.input_layernorm", width, sequence_parallel=True)
    yield from _attention(name, width, tp)
    if scales:
        yield Parameter(f"{name}.self_attn_bda.gamma", (width,), sequence_parallel=True)
    yield from _layernorm(f"{name}.pre_mlp_layernorm", width, sequence_parallel=True)
    yield from _mlp(name, width, vision.ffn_hidden_size, tp)
    if scales:
        yield Parameter(f"{name}.mlp_bda.gamma", (width,), sequence_parallel=True)


def _language_layer(language: LanguageConfig, name: str, tp: int) -> Iterator[Parameter]:
    width = language.hidden_size
    yield from _layernorm(f"{name}.input_layernorm", width, sequence_parallel=True)
    yield from _attention(name, width, tp)
    yield from _layernorm(f"{name}.pre_mlp_layernorm", width, sequence_parallel=True)
    yield from _mlp(name, width, language.ffn_hidden_size, tp)


def _attention(name: str, width: int, tp: int) -> Iterator[Parameter]:
    # The bias of a row-parallel layer is added after the reduction: under sequence parallelism to a part of it.
    yield Parameter(f"{name}.self_attention.linear_proj.weight", (width, width // tp))
    yield Parameter(f"{name}.self_attention.linear_proj.bias", (width,), sequence_parallel=True)
    yield Parameter(f"{name}.self_attention.linear_qkv.weight", (3 * width // tp, width))
    yield Parameter(f"{name}.self_attention.linear_qkv.bias", (3 * width // tp,))


def _mlp(name: str, width: int, ffn_width: int, tp: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.mlp.linear_fc1.weight", (ffn_width // tp, width))
    yield Parameter(f"{name}.mlp.linear_fc1.bias", (ffn_width // tp,))
    yield Parameter(f"{name}.mlp.linear_fc2.weight", (width, ffn_width // tp))
    yield Parameter(f"{name}.mlp.linear_fc2.bias", (width,), sequence_parallel=True)


def _pool(width: int, hidden: int) -> Iterator[Parameter]:
    yield Parameter("pool.query", (width,))
    for part in ("query", "key", "value"):
        yield from _layernorm(f"pool.{part}_layernorm", width)
    for part in ("query", "key", "value"):
        yield Parameter(f"pool.{part}_projection.weight", (hidden, width))
        yield Parameter(f"pool.{part}_projection.bias", (hidden,))
    yield Parameter("pool.output_projection.weight", (hidden, hidden))


def _heads(language: LanguageConfig) -> Iterator[Parameter]:
    hidden, name = language.hidden_size, "language.heads"
    yield from _layernorm(f"{name}.final_layernorm", hidden)
    yield from _layernorm(f"{name}.context_layernorm", hidden)
    yield Parameter(f"{name}.context_projection.weight", (hidden, hidden))
    if language.context_bias:
        yield Parameter(f"{name}.context_projection.bias", (hidden,))


def _layernorm(name: str, width: int, sequence_parallel: bool = False) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (width,), sequence_parallel=sequence_parallel)
    yield Parameter(f"{name}.bias", (width,), sequence_parallel=sequence_parallel)
