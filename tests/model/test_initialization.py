"""Initial weights. Oracles: the table in the docstring of ``initialization``, as statistics of every parameter; and one
process, whose weights every layout must have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lcl_megatron.config import LanguageConfig, ParallelConfig, PoolConfig, RunConfig, VisionConfig
from lcl_megatron.model.initialization import count_parameters, initialize_weights
from lcl_megatron.model.lcl import LCLModel
from lcl_megatron.model.specs import Runtime
from lcl_megatron.parallel import engine as engines
from tests.distributed import run_distributed

TIED = "language.embedding.word_embeddings.weight"

# Wide enough for statistics, two widths that differ.
WIDE = RunConfig(
    vision=VisionConfig(
        image_size=56,
        patch_size=14,
        num_layers=2,
        hidden_size=96,
        ffn_hidden_size=192,
        num_attention_heads=4,
        layer_scale_init=0.25,
    ),
    pool=PoolConfig(num_attention_heads=4),
    language=LanguageConfig(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=256,
        num_attention_heads=4,
        vocab_size=500,
        max_position_embeddings=64,
        tie_embeddings=False,
    ),
)


def _expected_std(name: str, config: RunConfig) -> float:
    """The table, read by hand: standard deviation of every random parameter."""
    c, h = config.vision.hidden_size, config.language.hidden_size
    patch = 3 * config.vision.patch_size**2
    named = {
        "vision.embedding.weight": patch**-0.5,
        "vision.embedding.class_token": c**-0.5,
        "vision.embedding.position_embeddings": c**-0.5,
        "pool.query": c**-0.5,
        "pool.query_projection.weight": (3 * c) ** -0.5,
        "pool.key_projection.weight": (3 * c) ** -0.5,
        "pool.value_projection.weight": (3 * c) ** -0.5,
        "pool.output_projection.weight": (3 * h) ** -0.5,
        TIED: 0.02,
        "language.output_projection.weight": 0.02,
        "language.embedding.position_embeddings": 0.01,
        "language.heads.context_projection.weight": (3 * h) ** -0.5,
    }
    if name in named:
        return named[name]
    width, layers = (c, config.vision.num_layers) if name.startswith("vision.") else (h, config.language.num_layers)
    last_of_branch = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return (3 * width) ** -0.5 * ((2 * layers) ** -0.5 if last_of_branch else 1.0)


def test_every_parameter_is_drawn_as_the_table_says(runtime: Runtime) -> None:
    model = LCLModel(WIDE, runtime)
    initialize_weights(model, seed=3)
    random = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        constant = None
        if name == "logit_scale":
            constant = np.log(1 / 0.07)
        elif name.endswith("gamma"):
            constant = 0.25
        elif name.endswith("bias"):
            constant = 0.0
        elif "layernorm" in name:
            constant = 1.0
        if constant is not None:
            assert torch.allclose(values, torch.tensor(constant, dtype=torch.float64)), name
            continue
        random += 1
        std, count = _expected_std(name, WIDE), values.numel()
        assert abs(float(values.mean())) < 4 * std / count**0.5, name
        # The variance of a sample variance of a normal distribution is 2 / n.
        assert abs(float(values.square().mean()) / std**2 - 1) < 4 * (2 / count) ** 0.5, name
    assert random == 12 + 4 * (2 + 3)


def test_no_two_parameters_are_alike_and_another_seed_gives_others(runtime: Runtime) -> None:
    first, again, other = (LCLModel(WIDE, runtime) for _ in range(3))
    initialize_weights(first, seed=3)
    initialize_weights(again, seed=3)
    initialize_weights(other, seed=4)
    begins = []
    for (name, values), repeated, changed in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(values, repeated), name
        if len(values.unique()) > 1:
            assert not torch.equal(values, changed), name
            begins.append((values.flatten()[0] / values.std()).item())
    assert len(set(begins)) == len(begins)


def _weights(
    rank: int, world_size: int, config: RunConfig
) -> tuple[int, dict[str, tuple[np.ndarray, int | None, bool]]]:
    engine = engines.build_engine(config, engines.start(config))
    return engine.groups.tp_rank, {
        name: (
            parameter.detach().float().numpy(),
            parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None,
            getattr(parameter, "shared", False),
        )
        for model in engine.models
        for name, parameter in model.named_parameters()
    }


LAYOUTS = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp3": ParallelConfig(pipeline_model_parallel_size=3, pipeline_cuts=("vision.1", "language.1")),
    "pp2 x 2 stages": ParallelConfig(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_cuts=("pool", "language.embed", "heads"),
    ),
    "tp2 x pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, pipeline_cuts=("pool",)),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_do_not_depend_on_the_layout(parallel: ParallelConfig, tied: bool, tiny_run: RunConfig) -> None:
    config = dataclasses.replace(tiny_run, language=dataclasses.replace(tiny_run.language, tie_embeddings=tied))
    ((_, expected),) = run_distributed(_weights, 1, config)
    world_size = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    parts: dict[str, dict[int, np.ndarray]] = {}
    for tp_rank, weights in run_distributed(_weights, world_size, dataclasses.replace(config, parallel=parallel)):
        for name, (values, dim, is_copy) in weights.items():
            name = TIED if is_copy else name
            whole = expected[name][0]
            if dim is not None:
                size = values.shape[dim]
                whole = whole.take(range(tp_rank * size, (tp_rank + 1) * size), axis=dim)
            np.testing.assert_array_equal(values, whole, err_msg=name)
            parts.setdefault(name, {})[tp_rank if dim is not None else 0] = values
    assert parts.keys() == expected.keys()
    for name, slices in parts.items():
        assert sum(values.size for values in slices.values()) == expected[name][0].size, name


def test_parameters_are_counted(build_model: Callable[[RunConfig], LCLModel], tiny_run: RunConfig) -> None:
    model = build_model(tiny_run)
    c = f = 32
    layer = 4 * c * c + 4 * c + 2 * c * 64 + 64 + c + 4 * c  # attention, MLP, two LayerNorms
    vision = c * 3 * 14**2 + c + 5 * c + 2 * c + 2 * (layer + 2 * c) + 2 * c
    pool = c + 6 * c + 3 * (c * f + f) + f * f
    language = 128 * f + 64 * f + 2 * layer + 4 * f + f * f + f
    assert count_parameters(model) == vision + pool + language + 1
