"""Lines of text shards, plain, gzipped or zipped, with bounded memory."""

from __future__ import annotations

import gzip
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from lcl_megatron.data.document import Document, ImageSegment, Reject, Source, TextSegment
from lcl_megatron.data.readers.records import RecordError, assemble

MAX_LINE_BYTES = 64 << 20
"""Longer lines are rejected instead of read: a document of MMC4 has a few kilobytes."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """A line that is not blank."""

    source: Source
    """File and number."""
    data: bytes | None
    """Its bytes, without a byte order mark; None if it is too long to be read."""

    def raw(self) -> bytes:
        """Return the bytes.

        Raises:
            RecordError: ``line too long``.
        """
        if self.data is None:
            raise RecordError("line too long", f"more than {MAX_LINE_BYTES} bytes")
        return self.data


def read_lines(shard: Path, name: str = "") -> Iterator[Line]:
    """Yield the lines of a shard in order; blank ones are counted and left out.

    Args:
        shard: A text file, ``.gz``, or ``.zip`` of text files.
        name: What the shard is called in messages; empty = its file name.

    Raises:
        OSError: If the shard cannot be read, or is a damaged zip or gzip file.
    """
    name = name or shard.name
    opened = _zip_members(shard, name) if shard.suffix == ".zip" else _single_file(shard, name)
    with opened as members:
        for path, stream in members:
            with stream:
                yield from _stream_lines(stream, path)


def read_documents(
    shard: Path, name: str, parse: Callable[[bytes], tuple[Sequence[TextSegment], Sequence[ImageSegment]]]
) -> Iterator[Document | Reject]:
    """Yield the document of every line, or a reject; a damaged line costs that line only.

    Args:
        shard: See ``read_lines``.
        name: See ``read_lines``.
        parse: Makes text segments and images of a line; raises ``RecordError``.

    Raises:
        OSError: See ``read_lines``.
    """
    for line in read_lines(shard, name):
        try:
            segments, images = parse(line.raw())
        except RecordError as error:
            yield Reject(line.source, error.reason, error.detail)
        else:
            yield from assemble(segments, images, line.source)


def _stream_lines(stream: IO[bytes], path: str) -> Iterator[Line]:
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(MAX_LINE_BYTES)
            yield Line(Source(path, number), None)
            continue
        if number == 1:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        if raw and not raw.isspace():
            yield Line(Source(path, number), raw)


@contextmanager
def _single_file(shard: Path, name: str) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Open a plain or gzipped file; yields its name, without ``.gz``, and stream."""
    if shard.suffix != ".gz":
        yield iter([(name, open(shard, "rb"))])
        return
    try:
        yield iter([(name.removesuffix(".gz"), cast(IO[bytes], gzip.open(shard, "rb")))])
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise OSError(f"{shard} is a damaged gzip file ({error}); fetch it again or leave it out") from error


@contextmanager
def _zip_members(shard: Path, name: str) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """Open a zip; yields name and stream of every file inside it."""
    try:
        with zipfile.ZipFile(shard) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            folder = name.rpartition("/")[0]
            if len(members) == 1:
                names = [f"{folder}/{members[0].filename}".lstrip("/")]
            else:
                names = [f"{name}/{info.filename}" for info in members]
            # Members are read, never extracted: their names cannot place a file anywhere.
            yield ((path, archive.open(info)) for path, info in zip(names, members, strict=True))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise OSError(f"{shard} is a damaged zip file ({error}); fetch it again or leave it out") from error
    except RuntimeError as error:  # what zipfile says of a password
        raise OSError(f"{shard} cannot be read ({error}); unpack it and give its files instead") from error
