r"""The ``.bin`` / ``.idx`` pair of megatron-core's ``IndexedDataset``, read and written with checks.

``.bin`` holds the values of all sequences, one behind the other. ``.idx`` (little-endian) holds::

    9 bytes   magic "MMIDIDX\0\0"
    uint64    version, 1
    uint8     code of the value dtype
    uint64    number of sequences n
    uint64    number of document borders d (documents + 1)
    int32[n]  length of each sequence, in values
    int64[n]  position of each sequence in .bin, in bytes
    int64[d]  first sequence of each document; the last entry is n

megatron-core reads these files. This module does not use its reader: that one opens a truncated ``.bin`` without
a word, returns uninitialised memory for what is missing, and imports torch.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[str, int] = {"uint8": 1, "int32": 4, "uint16": 8}
"""The value dtypes that a corpus uses, with megatron-core's codes."""
MAX_SEQUENCE_LENGTH = 2**31 - 1
"""Lengths are stored as int32."""
COPY_VALUES = 1 << 20
"""Entries that are held in memory at one time while an index is written."""


class CorpusError(ValueError):
    """A corpus on disk that is damaged, incomplete or of another format."""


class IndexedFile:
    """Read access to one ``.bin`` / ``.idx`` pair.

    Args:
        prefix: Path without the suffix.

    Raises:
        CorpusError: If the pair is missing, of another format, or the sizes of the two files disagree.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index_path, data_path = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
        try:
            with open(index_path, "rb") as stream:
                header = stream.read(HEADER.size)
            index_size, data_size = index_path.stat().st_size, data_path.stat().st_size
        except FileNotFoundError as error:
            raise CorpusError(f"{error.filename} is missing; the corpus is incomplete: preprocess it again") from error
        if len(header) < HEADER.size:
            raise CorpusError(f"{index_path} holds {index_size} bytes; its header has {HEADER.size}: it is cut short")
        magic, version, code, num_sequences, num_borders = HEADER.unpack(header)
        if magic != MAGIC or version != 1:
            raise CorpusError(f"{index_path} is not an index of version 1: it begins with {header[:17]!r}")
        names = {value: key for key, value in DTYPE_CODES.items()}
        if code not in names:
            raise CorpusError(f"{index_path}: value dtype code {code}; a corpus uses only {DTYPE_CODES}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_borders
        if index_size != expected:
            raise CorpusError(f"{index_path} holds {index_size} bytes; its header announces {expected}: it is damaged")
        self.dtype = np.dtype(names[code])
        """Dtype of the values: uint8, uint16 or int32."""
        self.lengths = map_array(index_path, "<i4", HEADER.size, num_sequences)
        """(sequences,) int32, memory-mapped: values in each sequence."""
        self.pointers = map_array(index_path, "<i8", HEADER.size + 4 * num_sequences, num_sequences)
        """(sequences,) int64, memory-mapped: position of each sequence in ``.bin``, in bytes."""
        self.document_indices = map_array(index_path, "<i8", HEADER.size + 12 * num_sequences, num_borders)
        """(documents + 1,) int64, memory-mapped: first sequence of each document."""
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if num_sequences else 0
        if data_size != end:
            raise CorpusError(f"{data_path} holds {data_size} bytes; its index announces {end}: it is damaged")
        if num_borders < 1 or self.document_indices[0] != 0 or self.document_indices[-1] != num_sequences:
            raise CorpusError(f"{index_path}: its documents do not cover its {num_sequences} sequences: it is damaged")
        self._descriptor = os.open(data_path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        """Close the data file."""
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read_bytes(self, sequence: int) -> bytes:
        """Return the bytes of one sequence.

        Reads the file instead of mapping it: a disk error or a file cut short while in use is then an
        exception and not a SIGBUS that kills the process.

        Raises:
            IndexError: If there is no such sequence.
            CorpusError: If ``.bin`` ends before the sequence does.
        """
        if not 0 <= sequence < len(self.lengths):
            raise IndexError(f"{self.prefix}: sequence {sequence} of {len(self.lengths)}")
        offset = int(self.pointers[sequence])
        missing = int(self.lengths[sequence]) * self.dtype.itemsize
        if missing < 0 or offset < 0:
            raise CorpusError(f"{self.prefix}.idx: sequence {sequence} has a negative place or length: it is damaged")
        chunks = []
        while missing:
            chunk = os.pread(self._descriptor, missing, offset)
            if not chunk:
                raise CorpusError(f"{self.prefix}.bin ends inside sequence {sequence}: the file was cut while in use")
            chunks.append(chunk)
            offset, missing = offset + len(chunk), missing - len(chunk)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def read(self, sequence: int) -> np.ndarray:
        """Return the values of one sequence, (length,) of ``dtype``; raises as ``read_bytes``."""
        return np.frombuffer(self.read_bytes(sequence), dtype=self.dtype)


def map_array(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    """Return ``count`` values of a file as a read-only memory map (an empty array if there are none)."""
    if count == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def write_index(path: Path, dtype: np.dtype, lengths: np.ndarray, document_lengths: np.ndarray) -> None:
    """Write the ``.idx`` of a finished ``.bin``, with bounded memory.

    Args:
        path: The ``.idx`` file.
        dtype: Dtype of the values in ``.bin``.
        lengths: (sequences,) int32, may be memory-mapped: values in each sequence.
        document_lengths: (documents,) int32, may be memory-mapped: sequences in each document.
    """
    with open(path, "wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype.name], len(lengths), len(document_lengths) + 1))
        for begin in range(0, len(lengths), COPY_VALUES):
            stream.write(lengths[begin : begin + COPY_VALUES].astype("<i4").tobytes())
        position = 0
        for begin in range(0, len(lengths), COPY_VALUES):
            sizes = lengths[begin : begin + COPY_VALUES].astype(np.int64) * dtype.itemsize
            ends = position + np.cumsum(sizes)
            stream.write((ends - sizes).astype("<i8").tobytes())
            position = int(ends[-1])
        stream.write(np.zeros(1, dtype="<i8").tobytes())
        first = 0
        for begin in range(0, len(document_lengths), COPY_VALUES):
            borders = first + np.cumsum(document_lengths[begin : begin + COPY_VALUES].astype(np.int64))
            stream.write(borders.astype("<i8").tobytes())
            first = int(borders[-1])
        stream.flush()
        os.fsync(stream.fileno())
