"""Tiny models whose every parameter is random and not zero, so that no wrong map of names can pass."""

from __future__ import annotations

from typing import Any

import torch

from lcl_megatron.checkpoint.folders import Progress
from lcl_megatron.checkpoint.parameters import parameter_shapes
from lcl_megatron.checkpoint.weights import ModelWeights
from lcl_megatron.config import LanguageConfig, PoolConfig, RunConfig, VisionConfig

PROGRESS = Progress(step=7, consumed_rows=56, consumed_images=91, data={"corpus 0": "abc", "data.layout": "packed"})


def tiny_config(vision: dict[str, Any] | None = None, language: dict[str, Any] | None = None) -> RunConfig:
    """Return a model of two layers per tower, with 4 latents per image and a padded vocabulary."""
    return RunConfig(
        vision=VisionConfig(
            **{
                "image_size": 16,
                "patch_size": 8,
                "num_layers": 2,
                "hidden_size": 16,
                "ffn_hidden_size": 40,
                "num_attention_heads": 2,
                **(vision or {}),
            }
        ),
        pool=PoolConfig(num_attention_heads=4),
        language=LanguageConfig(
            **{
                "num_layers": 2,
                "hidden_size": 24,
                "ffn_hidden_size": 32,
                "num_attention_heads": 2,
                "vocab_size": 300,
                "max_position_embeddings": 64,
                "make_vocab_size_divisible_by": 128,
                **(language or {}),
            }
        ),
    )


def random_weights(
    config: RunConfig, seed: int = 0, tokenizer: bytes | None = None, dtype: torch.dtype = torch.float32
) -> ModelWeights:
    """Return weights under which activations stay of order 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in parameter_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("layernorm.weight"):
            value = 1 + 0.2 * noise
        elif name.endswith("gamma"):
            value = 0.4 + 0.1 * noise
        elif len(shape) > 1 and "embeddings" not in name:
            value = noise / noise[0].numel() ** 0.5
        else:
            value = 0.3 * noise
        assert (value != 0).all()
        state[name] = value.to(torch.float32 if name == "logit_scale" else dtype)
    return ModelWeights(config, state, tokenizer, PROGRESS)
