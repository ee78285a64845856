"""Transformers written out in plain torch, one sequence at a time, on the parameters of the modules under test.

Shares no code with the package: explicit products, explicit softmax per head, a loop over documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

State = Mapping[str, Tensor]


def randomize(module: nn.Module, seed: int) -> None:
    """Draw every parameter so that each matters: also biases, and LayerNorm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            around_one = parameter.dim() == 1 and ("layernorm.weight" in name or name.endswith("gamma"))
            parameter.copy_(1 + 0.2 * noise if around_one else 0.2 * noise)


def state_of(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the parameters under a prefix, with gradients."""
    return {n.removeprefix(prefix): p for n, p in module.named_parameters() if n.startswith(prefix)}


def layernorm(state: State, prefix: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scale = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return centred * scale * state[f"{prefix}.weight"] + state[f"{prefix}.bias"]


def linear(state: State, prefix: str, x: Tensor) -> Tensor:
    bias = state.get(f"{prefix}.bias")
    product = x @ state[f"{prefix}.weight"].T
    return product if bias is None else product + bias


def attention(query_SAD: Tensor, key_SAD: Tensor, value_SAD: Tensor, causal: bool) -> Tensor:
    """Return (S, A * D) of one sequence, head by head."""
    heads = []
    for query, key, value in zip(query_SAD.unbind(1), key_SAD.unbind(1), value_SAD.unbind(1), strict=True):
        scores = query @ key.T / query.shape[-1] ** 0.5
        if causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        heads.append(scores.softmax(dim=-1) @ value)
    return torch.cat(heads, dim=-1)


def attend_each(query_TAD: Tensor, key_TAD: Tensor, value_TAD: Tensor, borders: list[int], causal: bool) -> Tensor:
    """Return (T, A * D): attention of each sequence between two borders."""
    parts = [attention(query_TAD[a:b], key_TAD[a:b], value_TAD[a:b], causal) for a, b in itertools.pairwise(borders)]
    return torch.cat(parts)


def layer(
    state: State,
    x: Tensor,
    num_heads: int,
    causal: bool,
    activation: Callable[[Tensor], Tensor] = F.gelu,
    keep: tuple[float, float] = (1.0, 1.0),
    eps: float = 1e-5,
) -> Tensor:
    """Return one pre-norm layer's output (S, C) for one sequence; weights in megatron-core's names and layout."""
    branch = linear(state, "self_attention.linear_qkv", layernorm(state, "input_layernorm", x, eps))
    # Rows of the fused matrix: for every head its queries, its keys, its values.
    per_head = branch.view(len(x), num_heads, 3, -1)
    attended = attention(per_head[:, :, 0], per_head[:, :, 1], per_head[:, :, 2], causal)
    branch = linear(state, "self_attention.linear_proj", attended)
    x = x + keep[0] * branch * state.get("self_attn_bda.gamma", torch.ones(()))
    branch = linear(state, "mlp.linear_fc1", layernorm(state, "pre_mlp_layernorm", x, eps))
    branch = linear(state, "mlp.linear_fc2", activation(branch))
    return x + keep[1] * branch * state.get("mlp_bda.gamma", torch.ones(()))


def layer_states(state: State, num_layers: int) -> list[dict[str, Tensor]]:
    return [
        {n.removeprefix(f"layers.{i}."): t for n, t in state.items() if n.startswith(f"layers.{i}.")}
        for i in range(num_layers)
    ]


def assert_same_gradients(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], tolerance: float, floor: float = 1e-6
) -> None:
    """Compare gradients by the norm of the difference, relative to the gradient's norm.

    ``floor``, a share of the largest gradient, is what counts as zero: gradients that are zero but for rounding.
    """
    assert found.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None or not found[name].any(), f"{name} has a gradient"
            continue
        assert found[name] is not None, f"{name} has no gradient"
        error = float((found[name] - gradient).norm())
        assert error <= tolerance * float(gradient.norm()) + floor * tolerance * largest, f"{name}: {error:.1e}"


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
