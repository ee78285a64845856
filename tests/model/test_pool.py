"""The attention pool. Oracle: the formula of its docstring, written with loops over images, heads and patches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lcl_megatron.config import LanguageConfig, PoolConfig, VisionConfig
from lcl_megatron.model.pool import AttentionPool
from lcl_megatron.model.specs import Runtime
from tests.model import plain

VISION = VisionConfig(image_size=8, patch_size=4, hidden_size=20, ffn_hidden_size=40, num_attention_heads=2)
LANGUAGE = LanguageConfig(hidden_size=12, ffn_hidden_size=24, num_attention_heads=2)


def _pool(heads: int, runtime: Runtime) -> AttentionPool:
    pool = AttentionPool(VISION, PoolConfig(num_attention_heads=heads), LANGUAGE, runtime)
    plain.randomize(pool, seed=2)
    return pool


def _formula(pool: AttentionPool, features_PC: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    state = plain.state_of(pool)
    query = plain.linear(state, "query_projection", plain.layernorm(state, "query_layernorm", state["query"]))
    output = state["output_projection.weight"]
    latents, values, keys = [], [], []
    for patch in features_PC:
        keys.append(plain.linear(state, "key_projection", plain.layernorm(state, "key_layernorm", patch)))
        values.append(plain.linear(state, "value_projection", plain.layernorm(state, "value_layernorm", patch)))
        latents.append(output @ values[-1])
    width = LANGUAGE.hidden_size // heads
    attended = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.stack([torch.dot(query[part], key[part]) / math.sqrt(width) for key in keys]).exp()
        weights = weights / weights.sum()
        attended.append(sum(weight * value[part] for weight, value in zip(weights, values, strict=True)))
    return torch.stack(latents), output @ torch.cat(attended)


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_latents_pooled_and_gradients_equal_the_formula(
    heads: int, runtime: Runtime, generator: torch.Generator
) -> None:
    pool = _pool(heads, runtime)
    features = torch.randn(3, 7, VISION.hidden_size, generator=generator, requires_grad=True)
    latents, pooled = pool(features)
    expected = [torch.stack(column) for column in zip(*(_formula(pool, x, heads) for x in features), strict=True)]
    torch.testing.assert_close(latents, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, expected[1], rtol=1e-4, atol=1e-5)
    inputs = {"features": features, **dict(pool.named_parameters())}
    directions = [torch.randn(x.shape, generator=generator) for x in expected]
    ours, theirs = (
        dict(zip(inputs, torch.autograd.grad(outputs, list(inputs.values()), directions), strict=True))
        for outputs in ((latents, pooled), expected)
    )
    zero = {"key_projection.bias", "key_layernorm.bias"}  # a shift of all keys, which softmax does not see
    for name in zero:
        assert ours.pop(name).norm() < 1e-5 * ours["key_projection.weight"].norm()
        theirs.pop(name)
    plain.assert_same_gradients(ours, theirs, tolerance=1e-4)


def test_without_images_there_are_no_latents(runtime: Runtime) -> None:
    latents, pooled = _pool(2, runtime)(torch.zeros(0, 4, VISION.hidden_size))
    assert latents.shape == (0, 4, LANGUAGE.hidden_size)
    assert pooled.shape == (0, LANGUAGE.hidden_size)
