"""Members of a tar file in the order of the stream, read and never extracted.

``tarfile`` takes a damaged header, or the end of a file that was cut short between two members, for the end of the
archive. Here both are errors: a shard that lost its second half must not pass for a shard of half the size.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

COMPRESSED = (".tar.gz", ".tgz")
"""Endings of compressed tars."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")
"""Extensions of a sample's image."""
TEXT_EXTENSIONS = ("txt", "json")
"""Extensions of its caption and its record."""
MAX_TEXT_BYTES = 1 << 20
"""Larger captions and records are not read: they have a few hundred bytes."""
KEY_AND_EXTENSION = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)", re.DOTALL)
MAX_HEADER_BYTES = 1 << 20
"""Longest extended header: it is held in memory whatever it announces, and holds names and numbers."""
EXTENDED_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")
CUT_HEADER = ("empty header", "truncated header")
"""What ``tarfile`` says of a header, or of the second one of a long name, where the file ends."""
KINDS = {tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link"}


@dataclass(frozen=True)
class TarMember:
    """A member that is not a folder."""

    name: str
    """Its name as it stands in the archive; may be unsafe, and may hold lone surrogates if it is not UTF-8."""
    size: int
    """Bytes."""
    offset: int
    """Where its bytes begin, in the uncompressed archive."""
    problem: str
    """Why it is no plain file: ``a symbolic link``, ``a device``; empty if it is one."""
    _path: Path = field(repr=False)
    _archive: tarfile.TarFile = field(repr=False)
    _info: tarfile.TarInfo = field(repr=False)

    def read(self) -> bytes:
        """Return the bytes of a plain file; possible until the next member is asked for.

        Raises:
            ValueError: If it is no plain file.
            OSError: If the archive cannot be read, or is damaged.
        """
        if self.problem:
            raise ValueError(f"{self.name} is {self.problem}; only plain files are read")
        with _naming(self._path):
            return cast(IO[bytes], self._archive.extractfile(self._info)).read()


def tar_members(path: Path) -> Iterator[TarMember]:
    """Yield the members of a plain or gzipped tar file; concatenated archives are read as one.

    Raises:
        OSError: If the file cannot be read, or is damaged, or ends without an end mark.
    """
    with _naming(path), _open(path) as stream, _Archive(stream) as archive:
        while (info := archive.next()) is not None:
            # The archive would keep every header that it has met.
            archive.members = []  # type: ignore[attr-defined]
            if not info.isdir():
                yield TarMember(info.name, info.size, info.offset_data, _problem(info), path, archive, info)
        if not archive.ended:
            raise tarfile.ReadError("it ends without an end mark: it was cut short")


def split_name(name: str) -> tuple[str, str]:
    """Return key and extension, lower case, of a member: ``a.b/c.seg.PNG`` is ``a.b/c`` and ``seg.png``.

    Members of one key are a sample (webdataset). A name without either is its own key, with an empty extension.
    """
    match = KEY_AND_EXTENSION.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


class _Archive(tarfile.TarFile):
    """An archive that knows whether it has come to an end mark, and does not go on after a damaged header."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.ended = False
        # With ignore_zeros, reading goes on behind an end mark: shards are sometimes joined with cat.
        super().__init__(fileobj=stream, tarinfo=_Header, ignore_zeros=True, encoding="utf-8")


class _Header(tarfile.TarInfo):
    """A header that is checked before ``tarfile`` acts on it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENDED_TYPES and not 0 <= header.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {header.size} bytes; the limit is {MAX_HEADER_BYTES}")
        return header

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Header:
        archive = cast(_Archive, tarfile)
        try:
            header = super().fromtarfile(archive)
        except HEADER_ERROR as error:
            # The first error is the end mark, a block of zeros; the second one the end of the file.
            if isinstance(error, END_MARK):
                archive.ended = True
            elif not isinstance(error, END_OF_FILE):
                what = "it ends inside a header" if str(error) in CUT_HEADER else str(error)
                raise READ_ERROR(f"{what} at byte {archive.offset}") from error
            raise
        if header.size < 0:
            raise READ_ERROR(f"a member of {header.size} bytes at byte {archive.offset}")
        archive.ended = False
        return header


HEADER_ERROR, READ_ERROR = tarfile.HeaderError, tarfile.ReadError
END_MARK = tarfile.EOFHeaderError  # type: ignore[attr-defined]
END_OF_FILE = tarfile.EmptyHeaderError  # type: ignore[attr-defined]


def _open(path: Path) -> IO[bytes]:
    if path.name.endswith(COMPRESSED):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return open(path, "rb")


def _problem(info: tarfile.TarInfo) -> str:
    if info.isreg() and not info.issparse():
        return ""
    return KINDS.get(info.type, "a sparse file" if info.issparse() else "a device or another special file")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of damaged archives into an ``OSError`` that says which and what to do."""
    try:
        yield
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise OSError(f"{path} is a damaged tar file ({error}); fetch it again or leave it out") from error
