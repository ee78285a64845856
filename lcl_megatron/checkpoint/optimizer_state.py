"""Optimizer state for checkpoints: beside every parameter, its float32 value and Adam's two moments, sharded like it.

One format for all of megatron-core's optimizers, so that a run may go on with or without ``use_distributed_optimizer``,
and with torch's or TransformerEngine's Adam. Parameter groups are not stored: the configuration and the schedule make
them. megatron-core's own format differs between its optimizers; and where Adam is torch's, its distributed optimizer
(0.16.1) can write it but not read it: before the first step it finds no step count, then it looks for a tensor of that
name among the moments, and at last it gives all parameters one step counter, which each of them increments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments in every implementation."""
VALUE = "param"
"""Name of the float32 value."""
_KEY = "optimizer.state"


def sharded_state(
    optimizer: MegatronOptimizer, model: ShardedStateDict, is_loading: bool, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return the optimizer's part of a distributed checkpoint; collective over dp when saving.

    Moments that do not exist yet, before the first step, are made and are zero.

    Args:
        optimizer: the optimizer of the model.
        model: the model's sharded tensors.
        is_loading: the result will be filled and not written.
        metadata: megatron-core's sharding options.
    """
    parts = list(_parts(optimizer))
    for part in parts:
        _allocate_moments(part.optimizer)
    return {
        "step": _step(parts[0].optimizer),
        "tensors": {
            index: part.sharded_param_state_fully_reshardable(model, is_loading, metadata)
            if isinstance(part, DistributedOptimizer)
            else _whole_tensors(part.optimizer, model)
            for index, part in enumerate(parts)
        },
    }


def load_sharded_state(optimizer: MegatronOptimizer, model: ShardedStateDict, state: dict[str, Any]) -> None:
    """Fill the optimizer; no communication.

    Args:
        optimizer: the optimizer of the model.
        model: the model's sharded tensors.
        state: what ``sharded_state`` returned, with the checkpoint's tensors.
    """
    for index, part in enumerate(_parts(optimizer)):
        tensors = state["tensors"][index]
        if isinstance(part, DistributedOptimizer):
            # Its loader wants a value for every entry of Adam's state, and the checkpoint has none for the step.
            for moments in part.optimizer.state.values():
                moments.pop("step", None)
            part.load_parameter_state_from_fully_reshardable(tensors)
        else:
            for held, loaded in zip(_whole_tensors(part.optimizer, model), tensors, strict=True):
                for name, tensor in held.items():
                    tensor.data.copy_(loaded[name])
        _set_step(part.optimizer, state["step"])


def _parts(optimizer: MegatronOptimizer) -> Iterator[MegatronOptimizer]:
    """Yield the optimizers that a chained optimizer consists of."""
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


def _parameters(adam: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
    for group in adam.param_groups:
        for parameter in group["params"]:
            yield group, parameter


def _allocate_moments(adam: torch.optim.Optimizer) -> None:
    for _, parameter in _parameters(adam):
        if not adam.state[parameter]:
            adam.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}
            if _counts_per_parameter(adam):
                adam.state[parameter]["step"] = torch.zeros(())


def _counts_per_parameter(adam: torch.optim.Optimizer) -> bool:
    """Whether steps are counted beside the moments, as torch's Adam does; fused ones count in the group."""
    return isinstance(adam, torch.optim.Adam)


def _step(adam: torch.optim.Optimizer) -> int:
    """Return the number of steps taken; the same for all parameters."""
    if _counts_per_parameter(adam):
        steps = {int(adam.state[parameter]["step"]) for _, parameter in _parameters(adam)}
    else:
        steps = {int(group.get("step", 0)) for group, _ in _parameters(adam)}
    assert len(steps) <= 1, f"parameters have taken different numbers of steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def _set_step(adam: torch.optim.Optimizer, step: int) -> None:
    for group, parameter in _parameters(adam):
        if _counts_per_parameter(adam):
            # A tensor for each: Adam increments it in place.
            adam.state[parameter]["step"] = torch.tensor(float(step))
        else:
            group["step"] = step


def _whole_tensors(adam: torch.optim.Optimizer, model: ShardedStateDict) -> list[dict[str, ShardedTensor]]:
    """Return the state of an optimizer that holds it whole, one entry for each of the model's parameters."""
    return [
        {
            name: replace(sharded, key=f"{_KEY}.{name}.{sharded.key}", data=tensor, dtype=tensor.dtype)
            for name, tensor in _held_tensors(adam, sharded.data).items()
        }
        for sharded in nested_values(model)
        if isinstance(sharded, ShardedTensor) and isinstance(sharded.data, nn.Parameter)
    ]


def _held_tensors(adam: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    # In bf16 megatron-core hangs the float32 value, which Adam updates, on the parameter.
    value: Tensor = getattr(parameter, "main_param", parameter)
    return {VALUE: value.detach(), **{name: adam.state[value][name] for name in MOMENTS}}
