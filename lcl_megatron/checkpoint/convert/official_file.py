"""Files of the released LCL code: read whatever its training script saves, write what it and open_clip load.

A released ``.pt`` is ``{"state_dict": {"module.visual.conv1.weight": ...}, "epoch": ..., ...}`` or a plain state dict.
It says nothing of the architecture, which is read off the tensors' shapes; only attention heads leave no trace there.
Such a file may come from anywhere, so nothing but tensors is unpickled.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lcl_megatron.checkpoint.convert.official import from_official, to_official
from lcl_megatron.checkpoint.convert.stock_open_clip import open_clip_tower
from lcl_megatron.checkpoint.convert.stock_tower import StockTower
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.parameters import PARTS
from lcl_megatron.checkpoint.refused_pickles import what_failed
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.checkpoint.weights import ModelWeights
from lcl_megatron.config import RunConfig
from lcl_megatron.config.sources import preset_text
from lcl_megatron.config.toml import from_toml

Precision = Literal["fp32", "fp16", "bf16"]
"""Number formats of a released file."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What they are called by torch."""
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
_HEAD_WIDTH = 64
_LAYERNORM_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads of a released model, which its weights do not tell; 0 = one for every 64 of the width."""

    vision: int = 0
    """Of the vision tower."""
    pool: int = 0
    """Of the attention pool."""
    language: int = 0
    """Of the language model."""


def read_official_state(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a released file, without wrappers, in float32, which holds fp16 and bf16 exactly.

    Raises:
        CheckpointError: the file cannot be read, or holds anything but tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            # Mapped where possible: an optimizer state in the same file is then never read.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read: {what_failed(error)}; save its state dict alone: "
            "torch.save({'state_dict': model.state_dict()}, FILE)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, SafetensorError) as error:
        what = what_failed(error)
        raise CheckpointError(f"{path} cannot be read as a file of torch.save or safetensors: {what}") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} holds no state dict; expected tensors by name, or {{'state_dict': ...}} of them as the released "
            "training script saves"
        )
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return {name: value.float() for name, value in state.items()}


def infer_config(state: Mapping[str, Tensor], heads: Heads, source: str) -> RunConfig:
    """Return the configuration of a released model: sizes from its tensors, all else from the ``official`` recipe.

    Args:
        state: tensors under the released names.
        heads: attention heads, where they are not one for every 64 of the width.
        source: where the state comes from; errors start with it.

    Raises:
        CheckpointError: it lacks the tensors that tell sizes, or sizes are impossible.
    """
    sizes = _Sizes(state, source)
    patches, c = sizes.shape("visual.conv1.weight"), sizes.shape("visual.conv1.weight")[0]
    vocab_size, h = sizes.shape("text.token_embedding.weight")
    context = sizes.shape("text.positional_embedding")[0]
    grid = round((sizes.shape("visual.positional_embedding")[0] - 1) ** 0.5)
    if grid**2 + 1 != sizes.shape("visual.positional_embedding")[0]:
        raise CheckpointError(
            f"{source}: visual.positional_embedding has {sizes.shape('visual.positional_embedding')[0]} rows; expected "
            "one for the class token and a square number for the patches"
        )
    recipe = from_toml(preset_text("official_b16"), "preset official_b16")
    has_layer_scale = "visual.transformer.resblocks.0.ls_1.gamma" in state
    return dataclasses.replace(
        recipe,
        vision=dataclasses.replace(
            recipe.vision,
            image_size=grid * patches[2],
            patch_size=patches[2],
            num_layers=sizes.layers("visual"),
            hidden_size=c,
            ffn_hidden_size=sizes.shape("visual.transformer.resblocks.0.mlp.c_fc.weight")[0],
            num_attention_heads=sizes.heads(heads.vision, c, "vision"),
            # Its value is in the file; that there is a value is what counts.
            layer_scale_init=0.1 if has_layer_scale else None,
        ),
        pool=dataclasses.replace(recipe.pool, num_attention_heads=sizes.heads(heads.pool, h, "pool")),
        language=dataclasses.replace(
            recipe.language,
            num_layers=sizes.layers("text"),
            hidden_size=h,
            ffn_hidden_size=sizes.shape("text.transformer.resblocks.0.mlp.c_fc.weight")[0],
            num_attention_heads=sizes.heads(heads.language, h, "language"),
            vocab_size=vocab_size,
            max_position_embeddings=context,
        ),
        data=dataclasses.replace(recipe.data, seq_length=context),
    )


@dataclass(frozen=True)
class _Sizes:
    state: Mapping[str, Tensor]
    source: str

    def shape(self, name: str) -> torch.Size:
        if name not in self.state:
            raise CheckpointError(
                f"{self.source} has no {name}: it is no model of the released LCL code; an open_clip model is "
                "imported as open_clip:MODEL/FILE"
            )
        return self.state[name].shape

    def layers(self, tower: str) -> int:
        pattern = re.compile(rf"{tower}\.transformer\.resblocks\.(\d+)\.")
        return 1 + max((int(match[1]) for name in self.state if (match := pattern.match(name))), default=-1)

    def heads(self, given: int, width: int, part: str) -> int:
        if given and width % given:
            raise CheckpointError(f"{self.source}: --heads.{part} {given} does not divide the width {width}")
        if not given and width % _HEAD_WIDTH:
            raise CheckpointError(
                f"{self.source}: the width {width} is no multiple of {_HEAD_WIDTH}, so it is not one head for "
                f"every {_HEAD_WIDTH}; give their number: --heads.{part}"
            )
        return given or width // _HEAD_WIDTH


def read_official(path: str | Path, heads: Heads | None = None) -> ModelWeights:
    """Return the model of a released file.

    Args:
        path: ``.pt`` or ``.safetensors``.
        heads: attention heads; None = one for every 64 of the width.

    Raises:
        CheckpointError: the file cannot be read, is of another model, or lacks or adds a tensor.
    """
    state = read_official_state(path)
    return official_weights(state, infer_config(state, heads or Heads(), str(path)), str(path))


def official_weights(state: Mapping[str, Tensor], config: RunConfig, source: str) -> ModelWeights:
    """Return a state dict under the released names as a model; errors start with ``source``."""
    try:
        return ModelWeights(config, from_official(state, config))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def official_state(weights: ModelWeights) -> dict[str, Tensor]:
    """Return a whole model's weights under the released names.

    Tied embeddings become two matrices, and a bias of the context features that is zero is left out.

    Raises:
        CheckpointError: the weights are not those of a whole model, or the released code computes another function,
            whatever its weights; every reason is named.
    """
    weights.require(*PARTS)
    config, state = weights.config, dict(weights.state)
    bias = state.pop("language.heads.context_projection.bias", torch.zeros(1))
    reasons = {
        f"language.activation = {config.language.activation}; it has erf-GELU": config.language.activation != "gelu",
        f"vision.activation = {config.vision.activation}; it has erf-GELU": config.vision.activation != "gelu",
        "vision.class_token = false; it has a class token": not config.vision.class_token,
        "language.context_bias = true; it has no bias there, and this one is not zero": bool(bias.any()),
    }
    for section in ("vision", "language"):
        epsilon = getattr(config, section).layernorm_epsilon
        reasons[f"{section}.layernorm_epsilon = {epsilon}; it has {_LAYERNORM_EPSILON}"] = epsilon != _LAYERNORM_EPSILON
    if found := [reason for reason, holds in reasons.items() if holds]:
        listed = "\n  ".join(found)
        raise CheckpointError(
            f"the released code cannot run this model:\n  {listed}\n"
            "the recipe of the presets official_* can be converted to it; export the encoder alone for any other"
        )
    if config.language.tie_embeddings:
        state["language.output_projection.weight"] = state["language.embedding.word_embeddings.weight"]
    language = dataclasses.replace(config.language, tie_embeddings=False, context_bias=False)
    return to_official(state, dataclasses.replace(config, language=language))


def write_official(weights: ModelWeights, path: str | Path, precision: Precision = "fp32") -> None:
    """Write ``{"state_dict": ...}`` for the released code and open_clip; the file exists only when it is complete.

    Raises:
        CheckpointError: see ``official_state``; a value does not fit ``precision``; the file exists.
    """
    path = Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists; weights are never written over others: name another file")
    # Cloned: parts of one storage would be saved with all of it.
    state = {name: tensor.to(DTYPES[precision]).clone() for name, tensor in official_state(weights).items()}
    if overflown := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise CheckpointError(f"{overflown[0]} has values that {precision} cannot hold; write it as fp32")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".staging-{path.name}")
    torch.save({"state_dict": state}, staging)
    staging.rename(path)


def official_tower(state: Mapping[str, Tensor], config: RunConfig, source: str) -> StockTower:
    """Return open_clip's own vision tower with the weights of a released model.

    Args:
        state: tensors under the released names.
        config: sizes and heads.
        source: where the state comes from; errors start with it.

    Raises:
        LibraryError: open_clip is not installed.
    """
    vision = config.vision
    module = stock_library("open_clip.transformer").VisionTransformer(
        vision.image_size,
        vision.patch_size,
        vision.hidden_size,
        vision.num_layers,
        vision.num_attention_heads,
        vision.ffn_hidden_size / vision.hidden_size,
        ls_init_value=vision.layer_scale_init,
    )
    module.proj = None
    tower = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    module.load_state_dict(tower, strict=True)
    return open_clip_tower(module, source)
