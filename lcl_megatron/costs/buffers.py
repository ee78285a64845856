"""How megatron-core 0.16.1 lays parameters and gradients out in buffers and buckets.

A bucket is what one collective reduces or gathers. The rule, from ``ParamAndGradBuffer``:

- one buffer per parameter dtype, filled from the last parameter to the first;
- a bucket is closed once it holds ``max(40 million, 1 million x data-parallel ranks)`` elements; on stages behind the
  first, and without overlapped reduction, never;
- with the distributed optimizer every parameter begins at a multiple of 64 elements, every bucket ends at a multiple of
  ``lcm(ranks, 128)``, ranks being data- times context-parallel ones, and a shared embedding has a bucket of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lcl_megatron.config import ParallelConfig
from lcl_megatron.costs.parameters import Parameter

SMALLEST_BUCKET = 40_000_000
"""Elements after which a bucket is closed, at up to 40 data-parallel ranks."""
BUCKET_PER_RANK = 1_000_000
"""Elements per data-parallel rank after which it is closed, at more."""
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128
FLOAT32_BYTES = 4
GRADIENT_BYTES = FLOAT32_BYTES
"""Gradients are kept and reduced in float32 (``grad_reduce_in_fp32``)."""


@dataclass(frozen=True)
class Bucket:
    """Consecutive elements of a buffer that travel together."""

    numel: int
    """Elements, padding included."""
    parameters: tuple[tuple[int, int], ...]
    """Begin and end of each parameter, counted from the bucket's begin."""

    def owned(self, rank: int, replicas: int) -> int:
        """Return how many elements of parameters lie in a rank's equal share of the bucket."""
        share = self.numel // replicas
        begin, end = rank * share, (rank + 1) * share
        return sum(max(0, min(end, last) - max(begin, first)) for first, last in self.parameters)


@dataclass(frozen=True)
class Buffer:
    """Parameters of one dtype, and their gradients."""

    element_bytes: int
    """Bytes of an element of a parameter."""
    buckets: tuple[Bucket, ...]
    """In the order in which gradients become ready."""

    @property
    def numel(self) -> int:
        """Elements, padding included."""
        return sum(bucket.numel for bucket in self.buckets)

    @property
    def num_elements(self) -> int:
        """Elements of parameters."""
        return sum(end - begin for bucket in self.buckets for begin, end in bucket.parameters)


def lay_out(
    parameters: Sequence[Parameter], parallel: ParallelConfig, element_bytes: int, replicas: int, is_first_stage: bool
) -> tuple[Buffer, ...]:
    """Return a stage's buffers.

    Args:
        parameters: of the stage on one rank, in the order of ``named_parameters``.
        parallel: says whether the optimizer is distributed and the reduction overlapped.
        element_bytes: bytes of a parameter that is not kept in float32.
        replicas: data- times context-parallel ranks, which all hold the same parameters.
        is_first_stage: whether the stage is the pipeline's first.
    """
    by_bytes: dict[int, list[Parameter]] = {}
    for parameter in parameters:
        by_bytes.setdefault(FLOAT32_BYTES if parameter.is_float32 else element_bytes, []).append(parameter)
    limit = max(SMALLEST_BUCKET, BUCKET_PER_RANK * (replicas // parallel.context_parallel_size))
    largest = limit if is_first_stage and parallel.overlap_grad_reduce else None
    is_sharded = parallel.use_distributed_optimizer
    return tuple(Buffer(size, _buckets(group, largest, is_sharded, replicas)) for size, group in by_bytes.items())


def _buckets(
    parameters: Sequence[Parameter], largest: int | None, is_sharded: bool, replicas: int
) -> tuple[Bucket, ...]:
    multiple = math.lcm(replicas, BUCKET_ALIGNMENT) if is_sharded else 1
    alignment = PARAMETER_ALIGNMENT if is_sharded else 1
    buckets: list[Bucket] = []
    held: list[tuple[int, int]] = []
    begin = position = 0

    def close(end: int) -> int:
        nonlocal held, begin
        end = -(-end // multiple) * multiple
        buckets.append(Bucket(end - begin, tuple((first - begin, last - begin) for first, last in held)))
        held, begin = [], end
        return end

    for parameter in reversed(parameters):
        position = -(-position // alignment) * alignment
        is_alone = is_sharded and parameter.shared_embedding
        if is_alone and held:
            position = close(position)
        held.append((position, position + parameter.numel))
        position += parameter.numel
        if is_alone or (largest is not None and position - begin >= largest):
            position = close(position)
    if held:
        close(position)
    return tuple(buckets)
