"""Optimizer state for checkpoints: beside every parameter, its float32 value and Adam's two moments, sharded like it.

One format for all of megatron-core's optimizers, so that a run may go on with or without ``use_distributed_optimizer``,
and with torch's or TransformerEngine's Adam. Each rank writes and reads the share that it holds, and nothing is
gathered. Parameter groups are not stored: the configuration and the schedule make them.
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

from lcl_megatron.checkpoint.held import Held, box_of, replica_of
from lcl_megatron.checkpoint.parameters import VALUE, optimizer_name
from lcl_megatron.parallel.gradient_norm import optimizer_parts

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments in every implementation."""


def held_state(optimizer: MegatronOptimizer, model: ShardedStateDict) -> list[Held]:
    """Return what a rank holds of the optimizer's state; no communication.

    Moments that do not exist yet, before the first step, are made and are zero.

    Args:
        optimizer: the optimizer of the model.
        model: the model's sharded tensors.
    """
    sharded = {entry.data: entry for entry in _sharded_parameters(model)}
    held = []
    for part in optimizer_parts(optimizer):
        _allocate_moments(part.optimizer)
        held += list(_shares(part, sharded) if isinstance(part, DistributedOptimizer) else _whole(part, sharded))
    return held


def adam_step(optimizer: MegatronOptimizer) -> int:
    """Return how many steps Adam has taken; skipped ones are not among them."""
    steps = {_step(part.optimizer) for part in optimizer_parts(optimizer)}
    assert len(steps) <= 1, f"parts of the optimizer have taken different numbers of steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_adam_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set how many steps Adam has taken."""
    for part in optimizer_parts(optimizer):
        for group, parameter in _parameters(part.optimizer):
            if _counts_per_parameter(part.optimizer):
                # A tensor for each: Adam increments it in place.
                part.optimizer.state[parameter]["step"] = torch.tensor(float(step))
            else:
                group["step"] = step


def _shares(part: DistributedOptimizer, sharded: dict[nn.Parameter, ShardedTensor]) -> Iterator[Held]:
    """Yield the state of an optimizer that holds a range of the elements of some parameters.

    Every data-parallel rank writes its own; of ranks that differ otherwise and hold the same, the first.
    """
    for buckets in part.gbuf_ranges:
        for bucket in next(iter(buckets.values())):
            for parameter, ranges in bucket["param_map"].items():
                entry = sharded[parameter]
                region = replace(box_of(entry), begin=ranges["param"].start, end=ranges["param"].end)
                is_written = all(rank == 0 for rank in replica_of(entry)[:-1])
                tensors = part._get_main_param_and_optimizer_states(parameter)
                for kind in (VALUE, *MOMENTS):
                    yield Held(optimizer_name(kind, entry.key), region, tensors[kind].detach(), is_written)


def _whole(part: MegatronOptimizer, sharded: dict[nn.Parameter, ShardedTensor]) -> Iterator[Held]:
    """Yield the state of an optimizer that holds it whole."""
    adam = part.optimizer
    for parameter, entry in sharded.items():
        # In bf16 megatron-core hangs the float32 value, which Adam updates, on the parameter.
        value: Tensor = getattr(parameter, "main_param", parameter)
        tensors = {VALUE: value, **{kind: adam.state[value][kind] for kind in MOMENTS}}
        is_written = all(rank == 0 for rank in replica_of(entry))
        for kind, tensor in tensors.items():
            yield Held(optimizer_name(kind, entry.key), box_of(entry), tensor.detach(), is_written)


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
        steps = {int(adam.state[parameter]["step"]) for _, parameter in _parameters(adam) if adam.state[parameter]}
    else:
        steps = {int(group.get("step", 0)) for group, _ in _parameters(adam)}
    assert len(steps) <= 1, f"parameters have taken different numbers of steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def _sharded_parameters(model: ShardedStateDict) -> Iterator[ShardedTensor]:
    for entry in nested_values(model):
        if isinstance(entry, ShardedTensor) and isinstance(entry.data, nn.Parameter):
            yield entry
