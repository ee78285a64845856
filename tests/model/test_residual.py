"""Residual branches. Oracle: x + keep * gamma * (output + bias), written out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lcl_megatron.config import VisionConfig
from lcl_megatron.model.residual import ResidualBranch
from lcl_megatron.model.specs import Runtime, vision_transformer_config


@pytest.fixture
def config(runtime: Runtime, tiny_vision: VisionConfig):
    return vision_transformer_config(tiny_vision, runtime)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_keep", [True, False])
@pytest.mark.parametrize("with_scale", [True, False])
def test_branch_is_scaled_kept_and_added(
    with_scale: bool, with_keep: bool, with_bias: bool, config, generator: torch.Generator
) -> None:
    branch = ResidualBranch(config, 0.5 if with_scale else None)
    gamma, keep, bias = torch.ones(32), torch.ones(6, 1, 1), torch.zeros(32)
    if with_scale:
        gamma = torch.randn(32, generator=generator)
        branch.gamma.data.copy_(gamma)
    if with_keep:
        keep = torch.tensor([0.0, 2.0, 0.0, 1.25, 1.25, 0.0])[:, None, None]
        branch.keep = keep
    if with_bias:
        bias = torch.randn(32, generator=generator)
    output, residual = (torch.randn(6, 1, 32, generator=generator) for _ in range(2))
    found = branch(True, False)((output, bias if with_bias else None), residual, 0.0)
    torch.testing.assert_close(found, residual + keep * gamma * (output + bias))
    if with_keep:
        assert torch.equal(found[0], residual[0])


def test_branch_keeps_the_dtype_of_the_stream(config) -> None:
    branch = ResidualBranch(dataclasses.replace(config, params_dtype=torch.bfloat16), None)
    branch.keep = torch.full((2, 1, 1), 1 / 0.7)
    x = torch.ones(2, 1, 32, dtype=torch.bfloat16)
    assert branch(True, False)((x, None), x, 0.0).dtype == torch.bfloat16


def test_without_layer_scale_there_is_no_parameter(config) -> None:
    assert list(ResidualBranch(config, None).parameters()) == []
    assert [name for name, _ in ResidualBranch(config, 0.1).named_parameters()] == ["gamma"]
