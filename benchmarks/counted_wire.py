"""The collectives of torch.distributed with every byte counted, over a real process group or one that moves nothing.

``one_rank_of_many`` lets a single process take the place of one rank of many: torch's fake process group says how many
ranks there are, and what they would send is made up here, so that all numbers are finite and of the right kind. What
other ranks would compute is missing: nothing that comes *back* from them (sums of gradients) is right.

Counted are the bytes that have to leave a rank: an all-gather sends its rows to every other rank, a reduce-scatter,
all-to-all or scatter sends every other rank its part. No time passes on this wire.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

COUNTED = ("all_gather_into_tensor", "all_gather", "reduce_scatter", "all_to_all", "scatter")
REFUSED = (
    *("all_reduce", "all_to_all_single", "broadcast", "gather", "reduce", "reduce_scatter_tensor", "barrier"),
    *("send", "recv", "isend", "irecv", "batch_isend_irecv", "all_gather_object", "_all_gather_base"),
)
"""What would otherwise be sent without being counted."""


def size_of(tensors: Tensor | Sequence[Tensor]) -> int:
    """Return the bytes of one or more tensors."""
    several = [tensors] if isinstance(tensors, Tensor) else tensors
    return sum(tensor.numel() * tensor.element_size() for tensor in several)


@dataclass
class Wire:
    """What a rank sends, by the direction that it is in."""

    rank: int
    """Rank of this process."""
    ranks: int
    """Ranks of the group."""
    width: int = 0
    """Channels D of the features, for what a fake group makes up."""
    direction: str = "forward"
    """``forward`` or ``backward``: under which heading bytes are counted from now on."""
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes sent, by direction."""
    calls: Counter[str] = field(default_factory=Counter)
    """Collectives called, by direction."""
    making_up_s: float = 0.0
    """Processor time, in seconds, that went into the features of ranks that do not exist."""

    def count(self, sent: int) -> None:
        """Add a collective and what this rank sends in it."""
        self.calls[self.direction] += 1
        self.sent[self.direction] += sent

    def made_up(self, local: Tensor, rank: int) -> Tensor:
        """Return what another rank would have sent: this rank's features with their channels rotated.

        Their lengths are kept, pairs stay as similar as they are, and others are as good as independent. Anything but
        features is repeated as it is.
        """
        if local.shape[-1] % self.width:
            return local
        return local.view(len(local), -1, self.width).roll(rank - self.rank, dims=-1).view(local.shape)


Collective = Callable[..., Any]


def _counting(wire: Wire, real: dict[str, Collective]) -> dict[str, Collective]:
    """Return the collectives that count and then do their work."""
    others = wire.ranks - 1

    def all_gather_into_tensor(output: Tensor, local: Tensor, group: Any = None) -> Any:
        wire.count(others * size_of(local))
        return real["all_gather_into_tensor"](output, local, group=group)

    def all_gather(outputs: list[Tensor], local: Tensor, group: Any = None) -> Any:
        wire.count(others * size_of(local))
        return real["all_gather"](outputs, local, group=group)

    def reduce_scatter(output: Tensor, parts: list[Tensor], op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        wire.count(size_of(parts) - size_of(parts[wire.rank]))
        return real["reduce_scatter"](output, parts, op=op, group=group)

    def all_to_all(outputs: list[Tensor], parts: list[Tensor], group: Any = None) -> Any:
        wire.count(size_of(parts) - size_of(parts[wire.rank]))
        return real["all_to_all"](outputs, parts, group=group)

    def scatter(output: Tensor, parts: list[Tensor] | None, src: int, group: Any = None) -> Any:
        wire.count(0 if parts is None else size_of(parts) - size_of(parts[wire.rank]))
        return real["scatter"](output, parts, src, group=group)

    return {function.__name__: function for function in (all_gather_into_tensor, all_gather, reduce_scatter)} | {
        "all_to_all": all_to_all,
        "scatter": scatter,
    }


def _making_up(wire: Wire) -> dict[str, Collective]:
    """Return the collectives of a group whose other ranks do not exist."""

    def all_gather(outputs: Sequence[Tensor], local: Tensor, group: Any = None) -> None:
        begin = time.process_time()
        for rank, output in enumerate(outputs):
            output.copy_(wire.made_up(local, rank))
        wire.making_up_s += time.process_time() - begin

    def all_gather_into_tensor(output: Tensor, local: Tensor, group: Any = None) -> None:
        all_gather(list(output.view(wire.ranks, *local.shape)), local)

    def reduce_scatter(output: Tensor, parts: list[Tensor], op: Any = None, group: Any = None) -> None:
        begin = time.process_time()
        output.copy_(parts[wire.rank])
        wire.making_up_s += time.process_time() - begin

    return {function.__name__: function for function in (all_gather, all_gather_into_tensor, reduce_scatter)}


def _refusing(name: str) -> Collective:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"torch.distributed.{name} was called, whose bytes are not counted; add it to COUNTED")

    return refuse


@contextmanager
def _replaced(functions: dict[str, Collective]) -> Iterator[None]:
    """Give functions of torch.distributed another meaning for a while."""
    before = {name: getattr(dist, name) for name in functions}
    for name, function in functions.items():
        setattr(dist, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


@contextmanager
def counted(wire: Wire) -> Iterator[None]:
    """Count what is sent over the process group that is running; refuse what could not be counted."""
    real = {name: getattr(dist, name) for name in COUNTED}
    with _replaced(_counting(wire, real) | {name: _refusing(name) for name in REFUSED}):
        yield


@contextmanager
def one_rank_of_many(ranks: int, width: int) -> Iterator[Wire]:
    """Be rank 0 of a group of which nobody else exists, and count what is sent.

    The group answers for NCCL: torch's differentiable all-gather then goes back through a reduce-scatter, as on a
    cluster, and not through the all-to-all that it needs elsewhere.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    wire = Wire(rank=0, ranks=ranks, width=width)
    missing = {name: _refusing(name) for name in ("all_to_all", "scatter")}
    try:
        with _replaced(_making_up(wire) | missing | {"get_backend": lambda group=None: dist.Backend.NCCL}):
            with counted(wire):
                yield wire
    finally:
        dist.destroy_process_group()
