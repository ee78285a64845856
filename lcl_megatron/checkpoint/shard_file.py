"""Files of tensor pieces, in safetensors format, and the index of all of a checkpoint's files.

A *piece* is what one rank writes of one tensor: a box of it, or a range of a box's elements in row-major order (the
distributed optimizer's share). The file's metadata says of each piece to which tensor it belongs and where it lies
there, so the files explain themselves: any safetensors reader opens them. ``index.json`` gathers this of all files.

Only the standard library is needed: the writer process imports this module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INDEX_FILE = "index.json"
_LENGTH_BYTES = 8
_MAX_HEADER = 100_000_000
_PIECES = "pieces"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """A part of a tensor: elements ``begin`` to ``end``, in row-major order, of a box."""

    shape: Shape
    """Shape of the whole tensor."""
    offset: Shape
    """First corner of the box."""
    size: Shape
    """Extent of the box."""
    begin: int
    """First element of the box that belongs to the region."""
    end: int
    """End of these elements."""

    @classmethod
    def box(cls, shape: Sequence[int], offset: Sequence[int], size: Sequence[int]) -> Region:
        """Return all of a box."""
        return cls(tuple(shape), tuple(offset), tuple(size), 0, math.prod(size))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Return a whole tensor."""
        return cls.box(shape, (0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        """Elements of the region."""
        return self.end - self.begin


@dataclass(frozen=True)
class NewPiece:
    """A piece in a file that is to be written."""

    tensor: str
    """Name of the tensor."""
    region: Region
    """Which part of it."""
    dtype: str
    """Dtype in safetensors' spelling, e.g. ``F32``."""
    itemsize: int
    """Bytes of an element."""


@dataclass(frozen=True)
class StoredPiece:
    """A piece in a file of a checkpoint."""

    file: str
    """Name of the file."""
    region: Region
    """Which part of the tensor."""
    position: int
    """Where its bytes begin in the file."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    dtype: str
    """Dtype in safetensors' spelling."""
    shape: Shape
    """Shape of the whole tensor."""
    pieces: tuple[StoredPiece, ...]
    """Where it lies."""


def file_header(pieces: Sequence[NewPiece]) -> bytes:
    """Return what stands in front of the bytes of some pieces, which follow in this order without gaps."""
    header: dict[str, Any] = {}
    places: dict[str, Any] = {}
    position = 0
    for number, piece in enumerate(pieces):
        region = piece.region
        is_box = region.numel == math.prod(region.size)
        name = piece.tensor if region == Region.whole(region.shape) else f"{piece.tensor}#{number}"
        end = position + region.numel * piece.itemsize
        shape = list(region.size) if is_box else [region.numel]
        header[name] = {"dtype": piece.dtype, "shape": shape, "data_offsets": [position, end]}
        places[name] = {"tensor": piece.tensor} | asdict(region)
        position = end
    header["__metadata__"] = {"format": "pt", _PIECES: json.dumps(places)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_pieces(path: Path) -> list[tuple[str, str, StoredPiece]]:
    """Return name of the tensor, dtype and place of every piece of a file.

    Raises:
        ValueError: it is not a file of pieces.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if not 0 < length <= _MAX_HEADER:
                raise ValueError(f"its header has {length} bytes")
            header = json.loads(stream.read(length))
        pieces = json.loads(header["__metadata__"][_PIECES])
        begin = _LENGTH_BYTES + length
        return [
            (
                str(piece["tensor"]),
                str(header[name]["dtype"]),
                StoredPiece(path.name, _region(piece), begin + int(header[name]["data_offsets"][0])),
            )
            for name, piece in pieces.items()
        ]
    except (ArithmeticError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of tensor pieces: {type(error).__name__} {error}") from error


def index_of(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return all tensors of some files of pieces.

    Raises:
        ValueError: the pieces of a tensor do not add up to it, or files contradict each other.
        OSError: a file cannot be read.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, dtype, stored in read_pieces(path):
            shape = stored.region.shape
            known = tensors.get(name, StoredTensor(dtype, shape, ()))
            if (known.dtype, known.shape) != (dtype, shape):
                raise ValueError(f"{path}: {name} is {dtype} {shape} here and {known.dtype} {known.shape} elsewhere")
            tensors[name] = StoredTensor(dtype, shape, (*known.pieces, stored))
    for name, tensor in tensors.items():
        held = sum(piece.region.numel for piece in tensor.pieces)
        if held != math.prod(tensor.shape):
            raise ValueError(f"{name} has {math.prod(tensor.shape)} elements, and the files hold {held} of it")
        _require_whole_boxes(name, tensor)
    return tensors


def _require_whole_boxes(name: str, tensor: StoredTensor) -> None:
    """Raise ValueError unless the pieces of each box follow each other: one that is there twice must not hide a gap."""
    boxes: dict[tuple[Shape, Shape], list[Region]] = {}
    for piece in tensor.pieces:
        boxes.setdefault((piece.region.offset, piece.region.size), []).append(piece.region)
    for (offset, size), regions in boxes.items():
        ordered = sorted(regions, key=lambda region: (region.begin, region.end))
        borders = [0, *(border for region in ordered for border in (region.begin, region.end)), math.prod(size)]
        if borders[::2] != borders[1::2]:
            raise ValueError(f"{name}: elements of its box {list(size)} at {list(offset)} are in no file, or in two")


def index_text(tensors: Mapping[str, StoredTensor]) -> str:
    """Return an index as JSON."""
    return json.dumps({name: asdict(tensors[name]) for name in sorted(tensors)}, indent=None) + "\n"


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Return an index from its file.

    Raises:
        ValueError: it is none.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: StoredTensor(
                str(tensor["dtype"]),
                _shape(tensor["shape"]),
                tuple(StoredPiece(str(p["file"]), _region(p["region"]), int(p["position"])) for p in tensor["pieces"]),
            )
            for name, tensor in content.items()
        }
    except (ArithmeticError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the index of a checkpoint: {type(error).__name__} {error}") from error


def _region(content: Mapping[str, Any]) -> Region:
    return Region(
        _shape(content["shape"]),
        _shape(content["offset"]),
        _shape(content["size"]),
        int(content["begin"]),
        int(content["end"]),
    )


def _shape(values: Sequence[Any]) -> Shape:
    return tuple(int(value) for value in values)
