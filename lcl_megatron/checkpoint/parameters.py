"""Names and shapes of all parameters of the whole model, from its configuration alone: no megatron-core, no model.

Names are those of ``LCLModel`` with the ``torch`` backend; shapes are whole, the same for every parallel layout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lcl_megatron.config import LanguageConfig, RunConfig, VisionConfig

Shape = tuple[int, ...]

PARTS = ("vision", "pool", "language", "logit_scale")
"""Parts of the model that weights may hold or lack; a parameter's part is its name up to the first dot."""
VALUE = "param"
"""Kind of optimizer state: the float32 value of a parameter."""
_OPTIMIZER_PREFIX = "optimizer.state."


def optimizer_name(kind: str, parameter: str) -> str:
    """Return what a checkpoint calls optimizer state of a parameter, such as its ``exp_avg``."""
    return f"{_OPTIMIZER_PREFIX}{kind}.{parameter}"


def split_name(name: str) -> tuple[str, str]:
    """Return kind and parameter of a name in a checkpoint; of a parameter itself the kind is empty."""
    if not name.startswith(_OPTIMIZER_PREFIX):
        return "", name
    kind, _, parameter = name.removeprefix(_OPTIMIZER_PREFIX).partition(".")
    return kind, parameter


def parameter_shapes(config: RunConfig, parts: Collection[str] = PARTS) -> dict[str, Shape]:
    """Return the shape of every parameter by its name.

    Args:
        config: its sections vision, pool and language decide.
        parts: of these parts of the model only.

    Raises:
        ConfigError: the language model is asked for and ``language.vocab_size`` is not set.
    """
    shapes: dict[str, Shape] = {}
    if "vision" in parts:
        shapes |= _vision(config.vision)
    if "pool" in parts:
        shapes |= _pool(config.vision.hidden_size, config.language.hidden_size)
    if "language" in parts:
        shapes |= _language(config.language)
    if "logit_scale" in parts:
        shapes["logit_scale"] = (1,)
    return shapes


def _affine(name: str, weight: Shape) -> dict[str, Shape]:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _vision(vision: VisionConfig) -> Iterator[tuple[str, Shape]]:
    c = vision.hidden_size
    yield "vision.embedding.weight", (c, 3, vision.patch_size, vision.patch_size)
    if vision.class_token:
        yield "vision.embedding.class_token", (c,)
    yield "vision.embedding.position_embeddings", (vision.num_tokens, c)
    yield from _affine("vision.embedding.layernorm", (c,)).items()
    for index in range(vision.num_layers):
        yield from _layer(f"vision.layers.{index}", c, vision.ffn_hidden_size)
        if vision.layer_scale_init is not None:
            yield f"vision.layers.{index}.self_attn_bda.gamma", (c,)
            yield f"vision.layers.{index}.mlp_bda.gamma", (c,)
    yield from _affine("vision.final_layernorm", (c,)).items()


def _pool(c: int, h: int) -> Iterator[tuple[str, Shape]]:
    yield "pool.query", (c,)
    for word in ("query", "key", "value"):
        yield from _affine(f"pool.{word}_layernorm", (c,)).items()
        yield from _affine(f"pool.{word}_projection", (h, c)).items()
    yield "pool.output_projection.weight", (h, h)


def _language(language: LanguageConfig) -> Iterator[tuple[str, Shape]]:
    h, v = language.hidden_size, language.padded_vocab_size
    yield "language.embedding.word_embeddings.weight", (v, h)
    yield "language.embedding.position_embeddings", (language.max_position_embeddings, h)
    for index in range(language.num_layers):
        yield from _layer(f"language.layers.{index}", h, language.ffn_hidden_size)
    yield from _affine("language.heads.final_layernorm", (h,)).items()
    yield from _affine("language.heads.context_layernorm", (h,)).items()
    yield "language.heads.context_projection.weight", (h, h)
    if language.context_bias:
        yield "language.heads.context_projection.bias", (h,)
    if not language.tie_embeddings:
        yield "language.output_projection.weight", (v, h)


def _layer(name: str, width: int, ffn: int) -> Iterator[tuple[str, Shape]]:
    yield from _affine(f"{name}.input_layernorm", (width,)).items()
    # Rows of linear_qkv are [head][q, k, v][head width].
    yield from _affine(f"{name}.self_attention.linear_qkv", (3 * width, width)).items()
    yield from _affine(f"{name}.self_attention.linear_proj", (width, width)).items()
    yield from _affine(f"{name}.pre_mlp_layernorm", (width,)).items()
    yield from _affine(f"{name}.mlp.linear_fc1", (ffn, width)).items()
    yield from _affine(f"{name}.mlp.linear_fc2", (width, ffn)).items()
