"""The gradient norm that all ranks decide by, known before anything is updated.

megatron-core's ``ChainedOptimizer.step`` does norm, clipping and update in one; a step that must not be taken has to
be recognised in between. Copies are left out of the norm as there: a parameter that every tensor-parallel rank holds
whole counts once, and so does a tied embedding. A copy's gradient that is not finite, on whichever rank, makes the
norm NaN all the same, because that copy would be updated with it.

Why all ranks see one norm: with the distributed optimizer every rank adds up its slices and the sum goes over all
ranks. Without it gradients have been summed over dp x cp already, all of these ranks hold the same bits, and the sum
goes over tp x pp. A value that is not finite survives every one of these sums. Only a gradient that one replica alone
spoils behind the reduction, in its own memory, goes unseen by the others there (``parallel/parameter_hash.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer, clip_grads
from torch import Tensor


@torch.no_grad()
def gradient_norm(optimizer: MegatronOptimizer, device: torch.device) -> float:
    """Return the global gradient norm; NaN or infinity, on all ranks alike, if any gradient on any rank is not finite.

    Args:
        optimizer: of ``build_optimizer``, behind its ``prepare_grads``.
        device: where the gradients are.

    Parallel: one all-reduce of a float32 over all ranks (distributed optimizer) or tp x pp; one wait for the device.
    """
    squares = 0.0
    for part in optimizer_parts(optimizer):
        counted = part.get_main_grads_for_grad_norm()
        known = set(map(id, counted))
        copies = [p.grad for p in part.get_parameters() if p.grad is not None and id(p.grad) not in known]
        total = _norm(counted, device) ** 2
        if copies:
            # Zero if they are finite, else NaN: no second reduction, and no other bit in a healthy norm.
            total += 0.0 * _norm(copies, device)
        dist.all_reduce(total, group=part.get_grad_stats_parallel_group())
        squares += float(total)
    return math.sqrt(squares)


@torch.no_grad()
def clip_and_update(optimizer: MegatronOptimizer, norm: float, max_norm: float) -> None:
    """Scale gradients so that their norm is at most ``max_norm`` (0 = as they are) and update the parameters.

    Args:
        optimizer: of ``build_optimizer``, behind its ``prepare_grads``.
        norm: of ``gradient_norm``.
        max_norm: largest global norm.

    Parallel: with the distributed optimizer, one all-gather of parameters over dp x cp, now or in the next forward
    pass.
    """
    for part in optimizer_parts(optimizer):
        if max_norm > 0 and (parameters := part.get_parameters()):
            clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=norm)
    optimizer.step_with_ready_grads()


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers that megatron-core has chained: one, as there are no expert parameters."""
    parts: list[Any] = optimizer.chained_optimizers
    return parts


def _norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Return the float32 norm of this rank's tensors, (1,), by the kernel of megatron-core's own norm."""
    if not gradients:
        return torch.zeros(1, device=device)
    overflow = torch.zeros(1, dtype=torch.int, device=device)
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], False)
    return norm.reshape(1)
