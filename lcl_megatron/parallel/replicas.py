"""Plain data parallelism for models that fit one device: evaluation under torchrun, without megatron-core.

Every rank holds the whole model. Losses are sums: ranks add their gradients and divide by the weight of all ranks'
examples, so that a step does not depend on how many ranks shared its batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lcl_megatron.parallel.collectives import gather_rows
from lcl_megatron.parallel.contrastive import PairSlots, contrastive_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""How long a rank waits for the others; the first one may read a whole test set alone."""
BUCKET_BYTES = 64 << 20
"""Gradients that are added in one all-reduce."""
TILE_SIZE = 8192
"""Columns of the similarity matrix that exist at one time."""


class ReplicaError(RuntimeError):
    """The launcher's processes do not fit the machine or the task."""


@dataclass(frozen=True)
class Replicas:
    """The processes of a run, as one of them sees them. One process without a launcher is the case ``size = 1``."""

    rank: int
    """Of this process, from 0."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""
    group: ProcessGroup | None
    """All processes; None = this process alone."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this rank's contiguous part of ``range(count)``; parts differ by at most one."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_gradients(self, parameters: Iterable[Tensor], divisor: float) -> None:
        """Replace every gradient by the sum over ranks, divided by ``divisor``.

        A parameter without a gradient on this rank counts as zero, so that all ranks reduce the same tensors.

        Parallel: one all-reduce per 64 MiB of gradients.
        """
        bucket: list[Tensor] = []
        held = 0
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            held += parameter.grad.numel() * parameter.grad.element_size()
            if held >= BUCKET_BYTES:
                self._sum_bucket(bucket, divisor)
                bucket, held = [], 0
        self._sum_bucket(bucket, divisor)

    def _sum_bucket(self, bucket: list[Tensor], divisor: float) -> None:
        if not bucket:
            return
        if self.group is not None:
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat, group=self.group)
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view_as(to) for part, to in zip(parts, bucket, strict=True)])
        torch._foreach_div_(bucket, divisor)

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over ranks of a tensor of the same shape on every rank; not differentiable.

        Parallel: one all-reduce.
        """
        total = values.detach().to(self.device, copy=True)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total

    def gather(self, rows: Tensor, num_rows: Sequence[int]) -> Tensor:
        """Return the rows of all ranks, rank after rank; not differentiable.

        Args:
            rows: (num_rows[rank], ...) on this rank.
            num_rows: rows of every rank, e.g. the lengths of their ``share``.

        Returns:
            (sum(num_rows), ...) on this rank's device.

        Parallel: one all-gather of the longest rank's size.
        """
        padded = gather_rows(rows.to(self.device), num_rows, self.group)
        if self.group is None:
            return padded
        return torch.cat([part[:count] for part, count in zip(padded.chunk(self.size), num_rows, strict=True)])

    def gather_shares(self, rows: Tensor, count: int) -> Tensor:
        """Return ``gather`` of rows that were computed for ``share(count)``: (count, ...), in order."""
        lengths = [count * (rank + 1) // self.size - count * rank // self.size for rank in range(self.size)]
        return self.gather(rows, lengths)

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's picklable value, in rank order. Parallel: one all-gather of objects."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return cast("list[T]", values)

    def from_first(self, value: T) -> T:
        """Return the first rank's picklable value on every rank: what one process decides for all.

        Parallel: one broadcast of objects.
        """
        if self.group is None:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return cast("T", values[0])

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with the first rank's, in place. Parallel: one broadcast per tensor."""
        if self.group is not None:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0, group=self.group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def contrast(
        self, images_ND: Tensor, texts_ND: Tensor, logit_scale: Tensor, is_pair_N: Tensor | None = None
    ) -> Tensor:
        """Return this rank's share of the symmetric InfoNCE loss (CLIP's), with all ranks' pairs as negatives.

        It is a sum over this rank's pairs; ranks' gradients add up to that of the whole (see ``contrastive_loss``).

        Args:
            images_ND: (N, D) of this rank, any length; N is the same on every rank.
            texts_ND: (N, D) of the same pairs.
            logit_scale: () log of the inverse temperature.
            is_pair_N: (N,) bool, which pairs count, on both sides; None = all, on every rank.

        Returns:
            () float32.

        Parallel: two all-gathers in the forward pass, nothing in the backward pass; one more for ``is_pair_N``.
        """
        num_slots = [len(images_ND)] * self.size
        if is_pair_N is None:
            is_pair_G = torch.ones(sum(num_slots), dtype=torch.bool)
        else:
            is_pair_G = self.gather(is_pair_N.to(torch.uint8), num_slots).bool().cpu()
        slots = PairSlots(num_slots, is_pair_G)
        return contrastive_loss(images_ND, texts_ND, logit_scale, slots, self.group, TILE_SIZE).loss_sum


@contextmanager
def replicas_of_launcher() -> Iterator[Replicas]:
    """Yield the processes that torchrun started, or this process alone; ends what it began.

    A process group that exists already is used and left as it is.

    Raises:
        ReplicaError: there are more processes than GPUs on this node.
    """
    device = _device()
    begins = not dist.is_initialized() and "RANK" in os.environ
    if begins:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    try:
        if dist.is_initialized() and dist.get_world_size() > 1:
            yield Replicas(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)
        else:
            yield Replicas(0, 1, device, None)
    finally:
        if begins:
            dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise ReplicaError(
            f"LOCAL_RANK = {local_rank}, but this node has {num_gpus} GPUs; start at most one process per GPU "
            "(torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
