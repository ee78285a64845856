"""Optimizer state for checkpoints: beside every parameter, its float32 value and Adam's two moments, sharded like it.

One format for all of megatron-core's optimizers, so that a run may go on with or without ``use_distributed_optimizer``,
and with torch's or TransformerEngine's Adam. Parameter groups are not stored: the configuration and the schedule make
them. megatron-core's own formats (0.16.1) differ between its optimizers, and the distributed one's has two faults:

- ``fully_reshardable`` cuts parameters out of a buffer at places that count the padding between the buffer's buckets,
  though the padding has been left out: behind the first padded bucket, parameters are stored with moments of others.
- Where Adam is torch's, what was written cannot be read: before the first step there is no step count to be found;
  then a tensor of that name is sought among the moments; and all parameters get one counter, which each increments.
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


def sharded_state(optimizer: MegatronOptimizer, model: ShardedStateDict, is_loading: bool) -> dict[str, Any]:
    """Return the optimizer's part of a distributed checkpoint; collective over dp when saving.

    Moments that do not exist yet, before the first step, are made and are zero.

    Args:
        optimizer: the optimizer of the model.
        model: the model's sharded tensors.
        is_loading: the result will be filled and not written.
    """
    parts = list(_parts(optimizer))
    for part in parts:
        _allocate_moments(part.optimizer)
    return {
        "step": _step(parts[0].optimizer),
        "tensors": {
            index: _gathered_tensors(part, model, is_loading)
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
            part.load_parameter_state_from_fully_reshardable(dict(enumerate(tensors)))
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


def _gathered_tensors(
    part: DistributedOptimizer, model: ShardedStateDict, is_loading: bool
) -> list[dict[str, ShardedTensor]]:
    """Return the state of an optimizer that holds a slice of each buffer, gathered over dp unless ``is_loading``.

    One entry for each parameter, buffer after buffer, in the order of the buffer.
    """
    world = part.get_parameter_state_dp_zero(use_gloo_comm=False, empty_data=is_loading, return_on_all_ranks=True)
    sharded = {entry.data: entry for entry in _sharded_parameters(model)}
    state = []
    for index, buffer in enumerate(part.buffers):
        (flat,) = world[index].values()
        lengths = [bucket.numel_unpadded for bucket in buffer.buckets]
        for parameter, (begin, end, bucket) in buffer.param_index_map.items():
            # ``flat`` has no padding between buckets; ``begin`` counts it.
            first = begin - buffer.bucket_indices[bucket][0] + sum(lengths[:bucket])
            state.append(
                {
                    name: _beside(
                        sharded[parameter], name, flat[name][first : first + end - begin].view(parameter.shape)
                    )
                    for name in (VALUE, *MOMENTS)
                }
            )
    return state


def _whole_tensors(adam: torch.optim.Optimizer, model: ShardedStateDict) -> list[dict[str, ShardedTensor]]:
    """Return the state of an optimizer that holds it whole, one entry for each of the model's parameters."""
    state = []
    for sharded in _sharded_parameters(model):
        # In bf16 megatron-core hangs the float32 value, which Adam updates, on the parameter.
        value: Tensor = getattr(sharded.data, "main_param", sharded.data)
        tensors = {VALUE: value.detach(), **{name: adam.state[value][name] for name in MOMENTS}}
        state.append({name: _beside(sharded, name, tensor) for name, tensor in tensors.items()})
    return state


def _sharded_parameters(model: ShardedStateDict) -> Iterator[ShardedTensor]:
    for entry in nested_values(model):
        if isinstance(entry, ShardedTensor) and isinstance(entry.data, nn.Parameter):
            yield entry


def _beside(parameter: ShardedTensor, name: str, tensor: Tensor) -> ShardedTensor:
    """Return a tensor that is sharded and replicated like a parameter, under a name of its own."""
    return replace(parameter, key=f"{_KEY}.{name}.{parameter.key}", data=tensor, dtype=tensor.dtype)
