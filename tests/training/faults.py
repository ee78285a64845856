"""Faults for runs of tests: gradients and losses that go wrong at one step on one rank, put in from outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.config import RunConfig
from lcl_megatron.model.lcl import LCLOutput
from lcl_megatron.parallel.engine import Engine
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from tests.training.small_runs import DataFolder, small_config

SKIPPED = 2
"""Index of the step that goes wrong, of five."""
STEPS = 5
Fault = Callable[[Run, list[int]], Any]
"""A context in which the step whose index stands in the list's only place goes wrong on some rank."""


def config_of(data: DataFolder, **sections: dict[str, Any]) -> RunConfig:
    sections.setdefault("training", {})["train_iters"] = STEPS
    return small_config(data.corpus, **sections)


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().copy()


def everything(run: Run) -> dict[str, np.ndarray]:
    """Weights, and all that the optimizer of this rank holds, as bytes."""
    with run.engine.whole_parameters():
        state = {name: bits(p) for model in run.engine.models for name, p in model.named_parameters()}
    (part,) = run.trainable.optimizer.chained_optimizers
    for group_number, group in enumerate(part.optimizer.param_groups):
        state[f"group {group_number} step"] = np.asarray(group.get("step", 0))
        for number, parameter in enumerate(group["params"]):
            where = f"group {group_number} parameter {number}"
            state[where] = bits(parameter)
            held = part.optimizer.state[parameter]
            assert {"exp_avg", "exp_avg_sq"} <= held.keys()
            state |= {f"{where} {name}": bits(torch.as_tensor(value)) for name, value in held.items()}
    return state


def gradient_of(rank: int, copy: bool = False, value: float = np.nan) -> Fault:
    """One entry of one parameter's gradient goes wrong on one rank; ``copy`` = of one that tp ranks hold whole."""

    @contextmanager
    def fault(run: Run, now: list[int]) -> Iterator[None]:
        if run.engine.groups.rank == rank:
            wants_split = run.engine.groups.tp_size > 1 and not copy
            parameters = run.engine.models[0].parameters()
            chosen = [p for p in parameters if getattr(p, "tensor_model_parallel", False) == wants_split]

            def spoil(gradient: Tensor) -> Tensor:
                spoilt = gradient.clone()
                spoilt.view(-1)[0] = value if now == [SKIPPED] else spoilt.view(-1)[0]
                return spoilt

            chosen[0].register_hook(spoil)
        yield

    return fault


def loss_of(rank: int, value: float = np.nan) -> Fault:
    """The next-token loss has no value on one rank, while its gradient is as ever."""

    @contextmanager
    def fault(run: Run, now: list[int]) -> Iterator[None]:
        plain = Engine.forward_backward

        def spoilt(self: Engine, micro_batches: Any, loss_function: Any, *rest: Any, **named: Any) -> list[Any]:
            def without_value(micro_batch: int, output: LCLOutput) -> Any:
                if now == [SKIPPED] and self.groups.rank == rank:
                    output = dataclasses.replace(output, token_losses_K=output.token_losses_K + value)
                return loss_function(micro_batch, output)

            return plain(self, micro_batches, without_value, *rest, **named)

        with patch.object(Engine, "forward_backward", spoilt):
            yield

    return fault


@contextmanager
def nothing(run: Run, now: list[int]) -> Iterator[None]:
    """Nothing goes wrong."""
    yield


def nan_from(first: int, last: int = STEPS) -> Fault:
    """Every gradient of some steps, by index, is no number."""

    @contextmanager
    def fault(run: Run, now: list[int]) -> Iterator[None]:
        parameter = next(iter(run.engine.models[0].parameters()))
        parameter.register_hook(lambda gradient: gradient * (np.nan if first <= now[0] <= last else 1.0))
        yield

    return fault


@contextmanager
def training(config: RunConfig, fault: Fault) -> Iterator[Run]:
    """A run whose loop the test calls, with a fault at the steps that its loader hands out."""
    with run_from(config) as run:
        now = [0]
        batches = run.loader

        class Counted:
            def __iter__(self) -> Iterator[Any]:
                for batch in batches:
                    now[0] = batch.step
                    yield batch

        run.loader = Counted()  # type: ignore[assignment]
        with fault(run, now):
            yield run
