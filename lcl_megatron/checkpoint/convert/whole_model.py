"""The whole model for transformers: the timm tower, the pool and OPT in one folder, run by ``hf/modeling_lcl.py``.

Exact in what the timm tower and OPT are exact. A tied output matrix is written twice: transformers 5 ties by a name
that OPT inside another model does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from torch import Tensor

from lcl_megatron.checkpoint.convert import opt, timm_vit
from lcl_megatron.checkpoint.convert.table import Rule, Table, export_tensors, import_tensors, under
from lcl_megatron.checkpoint.parameters import parameter_shapes
from lcl_megatron.config import RunConfig
from lcl_megatron.data.tokenizer import PIECES, SpecialTokens

MODELING_FILE = "modeling_lcl.py"
_CLASS = "LCLForConditionalGeneration"
_HEADS = ("pool.", "language.heads.context_", "logit_scale")


def refusal(config: RunConfig, special: SpecialTokens | None) -> str | None:
    """Return why the folder cannot hold the model, or None if it can."""
    if special is None:
        return "there is no tokenizer, so nothing says which token stands for an image"
    return timm_vit.refusal(config) or opt.refusal(config)


def head_names(config: RunConfig) -> list[str]:
    """Return our names of what belongs to neither tower: attention pool, contrastive head of the text, temperature."""
    return [name for name in parameter_shapes(config) if name.startswith(_HEADS)]


def table(config: RunConfig) -> Table:
    """Return the rules of the whole model."""
    return (
        *under(timm_vit.table(config), "vision_model.timm_model."),
        *under(opt.table(config, write_tied_head=True), "language_model."),
        *(Rule(name, (name.removeprefix("language.heads."),)) for name in head_names(config)),
    )


def to_whole_model(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return the tensors of ``LCLForConditionalGeneration``; see ``table.export_tensors``."""
    return export_tensors(table(config), state)


def from_whole_model(tensors: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return the tensors of ``LCLForConditionalGeneration`` under our names: every parameter of the model.

    Rows that pad the vocabulary are zero. See ``table.import_tensors``.
    """
    return import_tensors(table(config), tensors)


def config_json(config: RunConfig, special: SpecialTokens) -> dict[str, Any]:
    """Return ``config.json`` of the folder."""
    return {
        "model_type": "lcl",
        "architectures": [_CLASS],
        "auto_map": {
            "AutoConfig": "modeling_lcl.LCLConfig",
            "AutoModel": f"modeling_lcl.{_CLASS}",
            "AutoModelForCausalLM": f"modeling_lcl.{_CLASS}",
        },
        "vision_config": timm_vit.config_json(config),
        "text_config": opt.config_json(config, special) | {"tie_word_embeddings": False},
        "tie_word_embeddings": False,
        "pool_num_attention_heads": config.pool.num_attention_heads,
        "pool_layernorm_epsilon": config.vision.layernorm_epsilon,
        "context_bias": config.language.context_bias,
        "boi_token_id": special.boi,
        "image_token_id": special.image,
    }


def processor_json(config: RunConfig) -> dict[str, Any]:
    """Return ``processor_config.json``: LLaVA's processor puts one ``<image>`` for each patch in place of one."""
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
        "image_token": PIECES["image"],
    }


def modeling_code() -> str:
    """Return the source of ``modeling_lcl.py``."""
    return resources.files("lcl_megatron").joinpath("hf", MODELING_FILE).read_text(encoding="utf-8")
