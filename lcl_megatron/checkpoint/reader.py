"""Tensors out of the files of a checkpoint, by one process: no ranks, no groups, no megatron-core.

Files are JSON and bytes of tensors, so nothing that they hold can be run. What is read is verified first, unless the
caller has done so: only the files that hold what is asked for, so the vision tower alone is read, and may be copied,
without the rest.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from operator import add
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.checkpoint.folders import CONFIG_FILE, Progress, complete_checkpoints
from lcl_megatron.checkpoint.manifest import DamagedCheckpointError, Manifest, damage_of, raise_damages, read_manifest
from lcl_megatron.checkpoint.manifest import verify as verify_files
from lcl_megatron.checkpoint.shard_file import INDEX_FILE, Region, Shape, StoredPiece, StoredTensor, read_index

logger = logging.getLogger(__name__)

T = TypeVar("T")
Box = tuple[Shape, Shape]
"""First corner and extent of a box of a tensor."""

STATE_FILE = "state.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by safetensors' names."""


class CheckpointReader:
    """Read access to a training checkpoint.

    Args:
        folder: the checkpoint.
        verify: compare files with the manifest when they are first read.

    Raises:
        DamagedCheckpointError: it has no valid manifest or index.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._unverified = set(self.manifest.files) if verify else set()
        self._verify([INDEX_FILE])
        try:
            self.tensors: dict[str, StoredTensor] = read_index(folder / INDEX_FILE)
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(str(error)) from error
        unknown = {
            piece.file for tensor in self.tensors.values() for piece in tensor.pieces
        } - self.manifest.files.keys()
        if unknown:
            raise DamagedCheckpointError(
                f"{folder / INDEX_FILE} names {sorted(unknown)[0]!r}, and the manifest does not"
            )
        for name, stored in self.tensors.items():
            if not _is_possible(stored, self.manifest):
                raise DamagedCheckpointError(
                    f"{folder / INDEX_FILE}: the pieces of {name} are not all inside the tensor and their files, or do "
                    "not add up to it"
                )

    def state(self) -> dict[str, Any]:
        """Return what is saved beside tensors.

        Raises:
            DamagedCheckpointError: the file is damaged.
        """
        self._verify([STATE_FILE, CONFIG_FILE])
        path = self.folder / STATE_FILE
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            Progress(**state["progress"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedCheckpointError(f"{path} does not hold the progress of a run: {error}") from error
        return state

    def progress(self) -> Progress:
        """Return how far the run had come; raises as ``state``."""
        return Progress(**self.state()["progress"])

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return whole tensors, put together from the pieces that the ranks wrote, in the dtype as saved.

        Raises:
            DamagedCheckpointError: a tensor is absent, or a file of it is damaged or absent.
        """
        names = list(names)
        self._verify(piece.file for name in names for piece in self._stored(name).pieces)
        whole = {}
        for name in names:
            stored = self._stored(name)
            whole[name] = self.region(name, Region.whole(stored.shape)).view(stored.shape)
        return whole

    def region(self, name: str, region: Region) -> Tensor:
        """Return a part of a tensor.

        Returns:
            (region.numel,) in the dtype as saved, on the host.

        Raises:
            DamagedCheckpointError: as ``read``, or the tensor has another shape.
        """
        stored = self._stored(name)
        if stored.shape != region.shape:
            raise DamagedCheckpointError(
                f"{self.folder}: {name} has shape {stored.shape} in the checkpoint, expected {region.shape}"
            )
        pieces = stored.pieces
        self._verify(piece.file for piece in pieces if _overlap(piece.region, region))
        same_box = [piece for piece in pieces if _box(piece.region) == _box(region)]
        same_box.sort(key=lambda piece: piece.region.begin)
        values = torch.empty(region.numel, dtype=DTYPES[stored.dtype])
        filled = 0
        for piece in same_box:
            begin, end = max(piece.region.begin, region.begin), min(piece.region.end, region.end)
            # One behind the other: what is stored twice must not make up for a gap.
            if begin < end and begin == region.begin + filled:
                values[begin - region.begin : end - region.begin] = self._values(stored, piece, begin, end)
                filled += end - begin
        if not same_box:
            values, filled = self._cut(name, region)
        if filled != region.numel:
            raise DamagedCheckpointError(f"{self.folder}: {filled} of {region.numel} values of {name} are there")
        return values

    def _cut(self, name: str, region: Region) -> tuple[Tensor, int]:
        """Return a region whose box is none of the checkpoint's: it was written in another layout."""
        stored = self._stored(name)
        box = torch.empty(region.size, dtype=DTYPES[stored.dtype])
        filled = 0
        for other in dict.fromkeys(_box(piece.region) for piece in stored.pieces):
            shared = _intersection(_box(region), other)
            if shared is not None:
                source = self._whole_box(name, other)[_slices(shared, other[0])]
                box[_slices(shared, region.offset)] = source
                filled += source.numel()
        is_complete = filled == math.prod(region.size)
        return box.flatten()[region.begin : region.end], region.numel if is_complete else 0

    def _whole_box(self, name: str, box: Box) -> Tensor:
        stored = self._stored(name)
        offset, size = box
        whole = self.region(name, Region.box(stored.shape, offset, size))
        return whole.view(size)

    def _values(self, stored: StoredTensor, piece: StoredPiece, begin: int, end: int) -> Tensor:
        """Return elements ``begin`` to ``end`` of a piece's box."""
        dtype = DTYPES[stored.dtype]
        position = piece.position + (begin - piece.region.begin) * dtype.itemsize
        size = (end - begin) * dtype.itemsize
        path = self.folder / piece.file
        try:
            found = np.fromfile(path, dtype=np.uint8, count=size, offset=position)
        except OSError as error:
            raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
        if len(found) != size:
            raise DamagedCheckpointError(f"{path} ends before its tensors do: it was cut while in use")
        return torch.from_numpy(found).view(dtype)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise DamagedCheckpointError(f"{self.folder} has no tensor {name}")
        return self.tensors[name]

    def _verify(self, files: Iterable[str]) -> None:
        """Compare files with the manifest, each once."""
        for name in sorted(self._unverified.intersection(files)):
            raise_damages(self.folder, [damage_of(self.folder, name, self.manifest.files[name])])
            self._unverified.discard(name)


def from_newest(root: str | Path, read: Callable[[Path], T]) -> T | None:
    """Return what ``read`` makes of the newest checkpoint under ``root`` that it finds whole; None if there is none.

    Damaged ones are named in warnings.

    Args:
        root: a checkpoint, or a folder that holds some.
        read: takes a checkpoint's folder; raises DamagedCheckpointError if what it needs is damaged.

    Raises:
        DamagedCheckpointError: there are checkpoints, and all of them are damaged.
    """
    damaged: DamagedCheckpointError | None = None
    for checkpoint in complete_checkpoints(root):
        try:
            return read(checkpoint)
        except DamagedCheckpointError as error:
            damaged = error
            logger.warning("%s; the one before is tried", error)
    if damaged is not None:
        raise DamagedCheckpointError(
            f"{damaged}; no checkpoint of {root} is whole: copy it again, or take another"
        ) from damaged
    return None


def newest_whole(root: str | Path) -> Path | None:
    """Return the newest checkpoint under ``root`` whose files are all as they were written; as ``from_newest``."""

    def verified(checkpoint: Path) -> Path:
        verify_files(checkpoint)
        return checkpoint

    return from_newest(root, verified)


def _is_possible(stored: StoredTensor, manifest: Manifest) -> bool:
    """Return whether a tensor can be what an index says: the hashes do not tell what nobody ever wrote."""
    if stored.dtype not in DTYPES:
        return False
    itemsize = DTYPES[stored.dtype].itemsize
    for piece in stored.pieces:
        region, size = piece.region, manifest.files[piece.file].size
        if region.shape != stored.shape or not len(region.offset) == len(region.size) == len(stored.shape):
            return False
        box = zip(region.offset, region.size, stored.shape, strict=True)
        if not all(0 <= offset and 0 <= extent and offset + extent <= length for offset, extent, length in box):
            return False
        if not 0 <= region.begin <= region.end <= math.prod(region.size):
            return False
        if not 0 <= piece.position <= size - region.numel * itemsize:
            return False
    return sum(piece.region.numel for piece in stored.pieces) == math.prod(stored.shape)


def _box(region: Region) -> Box:
    return region.offset, region.size


def _overlap(one: Region, other: Region) -> bool:
    """Whether two regions may share elements."""
    if _box(one) == _box(other):
        return max(one.begin, other.begin) < min(one.end, other.end)
    return _intersection(_box(one), _box(other)) is not None


def _intersection(one: Box, other: Box) -> list[tuple[int, int]] | None:
    """Return begin and end, on each axis, of what two boxes share; None = nothing."""
    (offset, size), (other_offset, other_size) = one, other
    begins = map(max, offset, other_offset)
    ends = map(min, map(add, offset, size), map(add, other_offset, other_size))
    shared = list(zip(begins, ends, strict=True))
    return shared if all(begin < end for begin, end in shared) else None


def _slices(ranges: Iterable[tuple[int, int]], offset: Shape) -> tuple[slice, ...]:
    """Return ranges of a tensor as slices of a box of it that begins at ``offset``."""
    return tuple(slice(begin - first, end - first) for (begin, end), first in zip(ranges, offset, strict=True))
