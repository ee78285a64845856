"""Initial weights as a pure function of (seed, parameter name): the same for every parallel layout.

| parameter | distribution |
|---|---|
| matrices of layers, pool and context projection | normal, std (3 C)^-0.5 for the width C they read: 0.021 at C = 768 |
| ... of these, the last matrix of a residual branch | divided by (2 n)^0.5, n layers |
| patch embedding | normal, std (fan-in)^-0.5 |
| class token, vision positions, pool query | normal, std C^-0.5 (OpenCLIP) |
| token embedding, untied output matrix | normal, std 0.02 |
| LM positions | normal, std 0.01 |
| LayerNorm weights; LayerScale; logit_scale | 1; ``layer_scale_init``; ``logit_scale_init`` |
| all biases | 0 |
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from lcl_megatron.model.language import TIED_WEIGHT
from lcl_megatron.model.lcl import LCLModel


def initialize_weights(model: LCLModel, seed: int, tp_rank: int = 0, tp_size: int = 1) -> None:
    """Fill every parameter of a stage in place.

    Each tensor is drawn whole on the CPU and a tensor-parallel rank keeps its slice, so that neither cuts nor slices
    change a value, and both copies of a tied matrix agree without communication.

    Args:
        model: the stage.
        seed: seed of the run.
        tp_rank: this tensor-parallel rank.
        tp_size: number of tensor-parallel ranks.
    """
    for name, parameter in model.named_parameters():
        if name == "language.output_projection.weight" and parameter.shared:
            name = TIED_WEIGHT
        split = getattr(parameter, "tensor_model_parallel", False) and tp_size > 1
        shape = list(parameter.shape)
        dim = parameter.partition_dim if split else 0
        if split:
            shape[dim] *= tp_size
        value = _initial_value(model, name, shape, seed)
        if split:
            value = value.chunk(tp_size, dim)[tp_rank]
        with torch.no_grad():
            parameter.copy_(value)


def _initial_value(model: LCLModel, name: str, shape: list[int], seed: int) -> Tensor:
    config, leaf = model.run_config, name.rsplit(".", 1)[-1]
    if leaf == "logit_scale":
        return torch.full(shape, config.loss.logit_scale_init)
    if leaf == "gamma":
        return torch.full(shape, float(config.vision.layer_scale_init or 0.0))
    if leaf in ("bias", "layer_norm_bias"):
        return torch.zeros(shape)
    if "layernorm" in name or leaf == "layer_norm_weight":
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator) * _standard_deviation(model, name, shape)


def _standard_deviation(model: LCLModel, name: str, shape: list[int]) -> float:
    config = model.run_config
    vision_width, language_width = config.vision.hidden_size, config.language.hidden_size
    if name == "vision.embedding.weight":
        return math.prod(shape[1:]) ** -0.5
    if name in ("vision.embedding.class_token", "vision.embedding.position_embeddings", "pool.query"):
        return vision_width**-0.5
    if name == "language.embedding.position_embeddings":
        return 0.01
    if name in (TIED_WEIGHT, "language.output_projection.weight"):
        return 0.02
    if not name.startswith(("vision.layers.", "language.layers.")):
        return (3 * shape[1]) ** -0.5
    in_vision = name.startswith("vision.")
    std = (3 * (vision_width if in_vision else language_width)) ** -0.5
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std /= (2 * (config.vision if in_vision else config.language).num_layers) ** 0.5
    return std


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters that this rank holds."""
    return sum(parameter.numel() for parameter in module.parameters())
