"""A process group for a model that runs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from lcl_megatron.config import ParallelConfig, RunConfig
from lcl_megatron.model.lcl import LCLModel
from lcl_megatron.model.specs import Runtime
from lcl_megatron.parallel.groups import initialize
from tests.model import plain


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    yield Runtime(collection=groups.collection)
    groups.destroy()


@pytest.fixture
def build_model(runtime: Runtime) -> Callable[[RunConfig], LCLModel]:
    """Build a whole model whose every parameter matters."""

    def build(config: RunConfig) -> LCLModel:
        model = LCLModel(config, runtime)
        plain.randomize(model, seed=1)
        return model

    return build


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
