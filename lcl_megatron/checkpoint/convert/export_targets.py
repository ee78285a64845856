"""The folders that an export may consist of, one description for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from lcl_megatron.checkpoint.convert import clip_vision, opt, timm_vit, whole_model
from lcl_megatron.checkpoint.convert.tokenizer_json import tokenizer_files
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.weights import ModelWeights
from lcl_megatron.config import RunConfig
from lcl_megatron.data.tokenizer import SpecialTokens, Tokenizer

State = dict[str, Tensor]


@dataclass(frozen=True)
class ExportSource:
    """What is exported."""

    weights: ModelWeights
    """The model."""

    @property
    def config(self) -> RunConfig:
        """The run that made it."""
        return self.weights.config

    @cached_property
    def special(self) -> SpecialTokens | None:
        """Ids of the special tokens; None = there is no tokenizer.

        Raises:
            CheckpointError: the tokenizer has ids that the model has no row for.
        """
        if self.weights.tokenizer is None:
            return None
        tokenizer, rows = Tokenizer(self.weights.tokenizer), self.config.language.vocab_size
        if tokenizer.vocab_size > rows:
            raise CheckpointError(
                f"the tokenizer has {tokenizer.vocab_size} token ids, the model {rows}; they are not of one run: "
                "put the run's tokenizer.model beside the weights"
            )
        return tokenizer.special_tokens


@dataclass(frozen=True)
class Target:
    """One folder of an export."""

    name: str
    """Name in the report."""
    folder: str
    """Inside the export; "." = its root."""
    loaders: dict[str, str]
    """Names of the figures of ``--verify`` -> what loads the folder there."""
    refusal: Callable[[ExportSource], str | None]
    """Why the folder cannot hold this model; None = it can."""
    tensors: Callable[[State, RunConfig], State]
    """Contents of ``model.safetensors``, from tensors under our names."""
    restore: Callable[[State, RunConfig], State]
    """The way back to our names."""
    files: Callable[[ExportSource], dict[str, str]]
    """Contents of the other files, by name."""
    prepare: Callable[[State], State] = dict
    """What is done to our tensors beside renaming, so that ``restore`` cannot undo it."""
    notes: tuple[str, ...] = field(default=())
    """What a user should know, for the report."""


def targets() -> tuple[Target, ...]:
    """Return every folder that an export can have."""
    return (_VISION, _CLIP_VISION, _LANGUAGE_MODEL, _WHOLE_MODEL)


def json_text(value: Any) -> str:
    """Return a value as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _clip_vision_files(source: ExportSource) -> dict[str, str]:
    return {
        "config.json": json_text(clip_vision.config_json(source.config)),
        "preprocessor_config.json": json_text(clip_vision.preprocessor_json(source.config)),
    }


def _language_files(source: ExportSource) -> dict[str, str]:
    files = {
        "config.json": json_text(opt.config_json(source.config, source.special)),
        "generation_config.json": json_text(opt.token_ids(source.special)),
    }
    return files | _tokenizer_files(source, specials_in_text=False)


def _whole_model_files(source: ExportSource) -> dict[str, str]:
    assert source.special is not None, "whole_model.refusal says that there is no tokenizer"
    config = source.config
    return {
        "config.json": json_text(whole_model.config_json(config, source.special)),
        "preprocessor_config.json": json_text(clip_vision.preprocessor_json(config)),
        "processor_config.json": json_text(whole_model.processor_json(config)),
        whole_model.MODELING_FILE: whole_model.modeling_code(),
    } | _tokenizer_files(source, specials_in_text=True)


def _tokenizer_files(source: ExportSource, specials_in_text: bool) -> dict[str, str]:
    if source.weights.tokenizer is None:
        return {}
    return tokenizer_files(source.weights.tokenizer, source.config.language.max_position_embeddings, specials_in_text)


def _tokenizer_refusal(source: ExportSource) -> str | None:
    """Return why transformers has no tokenizer that gives the ids of the run's, or None if it has one."""
    try:
        _tokenizer_files(source, specials_in_text=False)
    except CheckpointError as error:
        return str(error)
    return None


_VISION = Target(
    name="vision",
    folder=".",
    loaders={"timm": 'timm.create_model("local-dir:DIR", pretrained=True)', "auto_model": "transformers.AutoModel"},
    refusal=lambda source: timm_vit.refusal(source.config),
    tensors=timm_vit.to_timm,
    restore=timm_vit.from_timm,
    files=lambda source: {"config.json": json_text(timm_vit.config_json(source.config))},
)
_CLIP_VISION = Target(
    name="clip_vision",
    folder="clip_vision",
    loaders={"clip_vision": "transformers.CLIPVisionModel"},
    refusal=lambda source: clip_vision.refusal(source.config),
    tensors=clip_vision.to_clip_vision,
    restore=clip_vision.from_clip_vision,
    files=_clip_vision_files,
    prepare=clip_vision.fold_layer_scale,
    notes=("LayerScale, if there is any, is multiplied into the layer before it; the round trip is of these products",),
)
_LANGUAGE_MODEL = Target(
    name="language_model",
    folder="language_model",
    loaders={"language_model": "transformers.OPTForCausalLM"},
    refusal=lambda source: opt.refusal(source.config) or _tokenizer_refusal(source),
    tensors=opt.to_opt,
    restore=opt.from_opt,
    files=_language_files,
    notes=("rows that only pad the vocabulary to a multiple are left out",),
)
_WHOLE_MODEL = Target(
    name="whole_model",
    folder="lcl",
    loaders={"whole_model": "LCLForConditionalGeneration of the folder's modeling_lcl.py"},
    refusal=lambda source: whole_model.refusal(source.config, source.special) or _tokenizer_refusal(source),
    tensors=whole_model.to_whole_model,
    restore=whole_model.from_whole_model,
    files=_whole_model_files,
    notes=("rows that only pad the vocabulary to a multiple are left out",),
)
