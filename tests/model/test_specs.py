"""megatron-core's configuration and specs. Oracles: the paper's settings; which weights tensor parallelism splits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lcl_megatron.config import ConfigError, LanguageConfig, RunConfig, VisionConfig
from lcl_megatron.model.lcl import LCLModel
from lcl_megatron.model.specs import (
    Runtime,
    SequenceParallelLayerNorm,
    language_transformer_config,
    resolve_transformer_impl,
    vision_transformer_config,
)


def test_torch_backend_runs_everywhere() -> None:
    assert resolve_transformer_impl("torch") == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_transformer_engine_without_a_gpu_is_a_configuration_error() -> None:
    assert resolve_transformer_impl("auto") == "torch"
    with pytest.raises(ConfigError, match=r"needs an NVIDIA GPU and TransformerEngine .*--transformer-impl torch"):
        resolve_transformer_impl("transformer_engine")


@pytest.mark.gpu
def test_auto_takes_transformer_engine_where_it_is_installed() -> None:
    pytest.importorskip("transformer_engine.pytorch")
    assert resolve_transformer_impl("auto") == "transformer_engine"


def test_configurations_carry_the_sizes_and_nothing_random(runtime: Runtime, tiny_run: RunConfig) -> None:
    vision = dataclasses.replace(tiny_run.vision, layernorm_epsilon=1e-3)
    language = dataclasses.replace(tiny_run.language, hidden_size=64, activation="gelu")
    for section, config in (
        (vision, vision_transformer_config(vision, runtime)),
        (language, language_transformer_config(language, runtime)),
    ):
        assert (config.num_layers, config.hidden_size, config.ffn_hidden_size, config.num_attention_heads) == (
            section.num_layers,
            section.hidden_size,
            section.ffn_hidden_size,
            section.num_attention_heads,
        )
        assert config.layernorm_epsilon == section.layernorm_epsilon
        assert config.hidden_dropout == config.attention_dropout == 0.0
        assert config.activation_func is torch.nn.functional.gelu
        # Fused GELU is the tanh approximation; the released model has the exact one.
        assert not config.bias_activation_fusion
        assert not config.gated_linear_unit
    assert language_transformer_config(LanguageConfig(), runtime).activation_func is torch.nn.functional.relu


def test_precision_reaches_every_parameter_but_the_temperature(runtime: Runtime, tiny_run: RunConfig) -> None:
    model = LCLModel(tiny_run, dataclasses.replace(runtime, params_dtype=torch.bfloat16))
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes.pop("logit_scale") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_weights_that_tensor_parallelism_splits_are_marked(runtime: Runtime, tiny_run: RunConfig) -> None:
    """By name: columns (dim 0) of qkv and fc1 with their biases, rows (dim 1) of proj and fc2, the token table."""
    model = LCLModel(tiny_run, runtime)
    for name, parameter in model.named_parameters():
        expected = None
        if "linear_qkv" in name or "linear_fc1" in name or "word_embeddings" in name:
            expected = 0
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            expected = 1
        found = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        assert found == expected, name


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_layernorm_of_a_split_sequence_is_marked(
    sequence_parallel: bool, runtime: Runtime, tiny_vision: VisionConfig
) -> None:
    # megatron-core switches sequence parallelism off without tensor parallelism.
    split = dataclasses.replace(runtime, tensor_parallel_size=2, sequence_parallel=sequence_parallel)
    norm = SequenceParallelLayerNorm(vision_transformer_config(tiny_vision, split), 32, eps=1e-3)
    assert norm.eps == 1e-3
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel] * 2
