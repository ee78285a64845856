"""Whether weights are still what they should be: the same on all replicas, and finite.

Replicas are compared by one hash of 8 bytes per rank, on the host.

Ranks that hold the same part of the model (dp x cp) must hold the same bits. Memory errors, and arithmetic or
collectives that go wrong on one device, break that silently. What a comparison can see depends on the optimizer.
Without the distributed one every replica updates its own copy, and a difference stays. With it every replica receives
each slice from the rank that updates it: a flipped bit is overwritten by the next step unless it was in the slice's
source, from where it reaches all replicas alike. Then a comparison finds only what went wrong since the last update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_megatron.parallel.engine import Engine
from lcl_megatron.parallel.groups import ProcessGroups

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
"""Elements that are weighted at one time; each takes 16 bytes meanwhile."""
_MIX = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))
"""Odd 64-bit constants (splitmix64), as signed integers."""


class ReplicaMismatchError(RuntimeError):
    """Ranks that must hold the same weights hold different ones: silent data corruption."""


@torch.no_grad()
def hash_tensors(tensors: Iterable[Tensor]) -> int:
    """Return a hash of all bits of some tensors, read as one sequence of elements.

    It is the sum over elements of bits x weight modulo 2**64. Weights are odd, so that a change of one element changes
    the sum whatever it was, and differ from place to place without a pattern. Sums of integers do not depend on their
    order: the hash is the same on every device.

    Args:
        tensors: of any floating-point or integer dtype, on any device; only their sums are brought to the host.

    Returns:
        From -2**63 to 2**63 - 1.
    """
    sums, begin = [], 0
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(_INTEGERS[tensor.element_size()])
        for chunk in bits.split(_CHUNK):
            sums.append((chunk * _weights(begin, chunk.numel(), chunk.device)).sum().reshape(1))
            begin += chunk.numel()
    return int(torch.cat(sums).sum()) if sums else 0


def _weights(begin: int, count: int, device: torch.device) -> Tensor:
    """Return the odd weights of places, (count,) int64; products wrap around as they do modulo 2**64."""
    places = torch.arange(begin + 1, begin + 1 + count, dtype=torch.int64, device=device) * _MIX[0]
    places = (places ^ (places >> 29)) * _MIX[1]
    return (places ^ (places >> 32)) | 1


def hash_parameters(engine: Engine) -> int:
    """Return the hash of this rank's parameters, all stages; call it within ``Engine.whole_parameters``."""
    return hash_tensors(parameter for model in engine.models for parameter in model.parameters())


def compare_replicas(engine: Engine, step: int, agreed_step: int) -> None:
    """Check that all replicas of every part of the model hold the same weights; collective over all ranks.

    Args:
        engine: the model.
        step: optimizer steps done, for the message.
        agreed_step: the step behind which they were last found equal; 0 = never.

    Raises:
        ReplicaMismatchError: on every rank, naming the ranks that differ from the majority of their replicas.

    Parallel: one all-gather of 8 bytes over all ranks, on the host.
    """
    groups = engine.groups
    with engine.whole_parameters():
        own = torch.tensor([hash_parameters(engine)], dtype=torch.int64)
    gathered = [torch.empty_like(own) for _ in range(groups.world_size)]
    dist.all_gather(gathered, own, group=groups.host)
    hashes = [int(value) for value in gathered]
    findings = [_finding(groups, replicas, hashes) for replicas in _replica_sets(groups)]
    if not any(findings):
        return
    earlier, checkpoint = "they have not been compared before", "the last checkpoint"
    if agreed_step:
        # A later one may hold the difference.
        earlier, checkpoint = f"equal after step {agreed_step}", f"the newest checkpoint up to step {agreed_step}"
    raise ReplicaMismatchError(
        f"step {step}: replicas of the same weights differ ({earlier}): {'; '.join(filter(None, findings))}. Memory, "
        f"arithmetic or a network card corrupts data silently: drain that node, and go on from {checkpoint}"
    )


@torch.no_grad()
def ranks_of_lost_weights(engine: Engine) -> list[str]:
    """Return which ranks hold weights that are not finite, described as in errors; collective over all ranks.

    Parallel: one all-gather of a byte over all ranks, on the host.
    """
    finite = [torch.isfinite(parameter).all() for model in engine.models for parameter in model.parameters()]
    own = torch.tensor([not bool(torch.stack(finite).all())], dtype=torch.uint8)
    gathered = [torch.empty_like(own) for _ in range(engine.groups.world_size)]
    dist.all_gather(gathered, own, group=engine.groups.host)
    return [engine.groups.describe(rank) for rank, is_lost in enumerate(gathered) if bool(is_lost)]


def _replica_sets(groups: ProcessGroups) -> list[list[int]]:
    """Return the global ranks that hold the same part of the model, for every part."""
    sets: dict[tuple[int, int], list[int]] = {}
    for rank in range(groups.world_size):
        place = groups.place(rank)
        sets.setdefault((place["pp"], place["tp"]), []).append(rank)
    return list(sets.values())


def _finding(groups: ProcessGroups, replicas: list[int], hashes: list[int]) -> str:
    """Return which replicas differ, or nothing."""
    (common, count), *others = Counter(hashes[rank] for rank in replicas).most_common()
    if not others:
        return ""
    if 2 * count <= len(replicas):
        return "no majority says which is right among " + ", ".join(groups.describe(rank) for rank in replicas)
    odd = [groups.describe(rank) for rank in replicas if hashes[rank] != common]
    return f"{', '.join(odd)} differs from the {count} other replicas"
