"""Initial weights as a pure function of (seed, parameter name): the same for every parallel layout.

| parameter | distribution |
|---|---|
| matrices of the layers, pool, context projection | normal, std 0.02; output projections of residual branches 0.02 / sqrt(2 n) |
| patch embedding | normal, std 1 / sqrt(fan-in) |
| class token, vision positions, pool query | normal, std C^-0.5 (as OpenCLIP) |
| token embedding, untied output matrix / LM positions | normal, std 0.02 / 0.01 |
| LayerNorm weights / LayerScale / logit_scale | 1 / ``layer_scale_init`` / ``logit_scale_init`` |
| all biases | 0 |
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from lcl_megatron.model.lcl import LCLModel

STD = 0.02
_TIED_WEIGHT = "language.embedding.word_embeddings.weight"


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
        if name == "language.output_weight" and parameter.shared:
            name = _TIED_WEIGHT
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
    if name == "vision.embedding.weight":
        return 1.0 / math.sqrt(math.prod(shape[1:]))
    if name in ("vision.embedding.class_token", "vision.embedding.position_embeddings", "pool.query"):
        return config.vision.hidden_size**-0.5
    if name == "language.embedding.position_embeddings":
        return 0.01
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        layers = config.vision.num_layers if name.startswith("vision.") else config.language.num_layers
        return STD / math.sqrt(2 * layers)
    return STD


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters that this rank holds."""
    return sum(parameter.numel() for parameter in module.parameters())
