"""What a rank holds of a checkpoint's tensors, in memory: which part of which tensor, and whether it writes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from torch import Tensor

from lcl_megatron.checkpoint.parameters import VALUE, optimizer_name, split_name
from lcl_megatron.checkpoint.reader import DTYPES, CheckpointReader
from lcl_megatron.checkpoint.shard_file import NewPiece, Region, file_header
from lcl_megatron.checkpoint.writer_process import NewFile

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Held:
    """What one rank holds of one tensor."""

    name: str
    """Name of the tensor in the checkpoint."""
    region: Region
    """Which part of it."""
    tensor: Tensor
    """(region.numel elements, any shape) its memory, on any device; loading writes into it."""
    is_written: bool
    """Whether this rank writes it: one of those that hold the same."""


def held_weights(model: ShardedStateDict) -> list[Held]:
    """Return what a rank holds of the model's tensors.

    Args:
        model: the model's sharded tensors, with megatron-core's account of what other ranks hold.
    """
    return [
        Held(entry.key, box_of(entry), entry.data.detach(), is_written=all(rank == 0 for rank in replica_of(entry)))
        for entry in nested_values(model)
        # Without FP8, TransformerEngine's "extra state" is empty, and it would have to be unpickled.
        if isinstance(entry, ShardedTensor) and entry.data is not None
    ]


def box_of(entry: ShardedTensor) -> Region:
    """Return which box of the whole tensor a rank's tensor is."""
    assert entry.prepend_axis_num == 0, f"{entry.key} is stacked over layers, which this model never does"
    return Region.box(entry.global_shape, entry.global_offset, entry.local_shape)


def replica_of(entry: ShardedTensor) -> tuple[int, ...]:
    """Return which of the ranks that hold the same this one is; the last number counts data-parallel ranks."""
    replica = entry.replica_id
    return replica if isinstance(replica, tuple) else (replica,)


def fill(held: Iterable[Held], reader: CheckpointReader, precise: bool = False) -> None:
    """Fill memory from a checkpoint of any layout.

    Args:
        held: what is filled.
        reader: the checkpoint.
        precise: fill float32 weights with the optimizer's values where the checkpoint's weights are rounded. A rank of
            the distributed optimizer has those only of its share, and the replicas would begin with different weights.

    Raises:
        DamagedCheckpointError: a tensor is absent, has another shape, or a file is damaged.
    """
    with torch.no_grad():
        for one in held:
            name = _precise(one, reader) if precise else one.name
            one.tensor.copy_(reader.region(name, one.region).view(one.tensor.shape))


def _precise(one: Held, reader: CheckpointReader) -> str:
    """Return the name of a tensor's float32 values if its memory holds such and the tensor of its own name does not."""
    value, stored = optimizer_name(VALUE, one.name), reader.tensors.get(one.name)
    is_rounded = stored is not None and stored.dtype != _NAMES[torch.float32]
    return value if one.tensor.dtype == torch.float32 and is_rounded and value in reader.tensors else one.name


def files_of(held: Iterable[Held], rank: int) -> list[NewFile]:
    """Return the files that a rank writes: ``PART-KIND-RANK.safetensors``.

    ``PART`` is a part of the model (vision, pool, language, logit_scale). ``KIND`` is ``weights``, with the float32
    values of the parameters beside those that the model computes with, or ``moments``, with Adam's.
    """
    files: dict[str, list[Held]] = defaultdict(list)
    for one in held:
        if one.is_written and one.region.numel:
            files[f"{_file_stem(one.name)}-{rank:05d}.safetensors"].append(one)
    return [_new_file(name, pieces) for name, pieces in files.items()]


def _file_stem(name: str) -> str:
    kind, parameter = split_name(name)
    return f"{parameter.split('.')[0]}-{'weights' if kind in ('', VALUE) else 'moments'}"


def _new_file(name: str, pieces: Sequence[Held]) -> NewFile:
    # Wide elements first: nothing is then read or written across the alignment of its type.
    pieces = sorted(pieces, key=lambda one: -one.tensor.element_size())
    header = file_header(
        [NewPiece(one.name, one.region, _NAMES[one.tensor.dtype], one.tensor.element_size()) for one in pieces]
    )

    def fill_in(memory: memoryview) -> None:
        memory[: len(header)] = header
        position = len(header)
        for one in pieces:
            place = torch.frombuffer(memory, dtype=one.tensor.dtype, count=one.region.numel, offset=position)
            place.copy_(one.tensor.reshape(-1))
            position += one.region.numel * one.tensor.element_size()

    return NewFile(name, len(header) + sum(one.region.numel * one.tensor.element_size() for one in pieces), fill_in)
