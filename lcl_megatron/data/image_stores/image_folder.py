"""Encoded images in a folder, by names that come from untrusted records.

A name is data from the web. It may say ``../../etc/passwd``, be absolute, or lead through a symbolic link, and a file
called ``.jpg`` may hold an HTML page or announce 10^10 pixels. Nothing is decoded here: a file that is cut short in
the middle is found when it is decoded for training.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ABSENT = {errno.ENOENT: "missing file", errno.ENOTDIR: "missing file"}
"""Errors that mean that there is no such file, with their reason."""
UNREADABLE = {errno.ENAMETOOLONG, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EINVAL}
"""Errors that are the file's own. Others (EIO, ESTALE, EMFILE) are the machine's, and stop the run."""


URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
"""How a name that is a URL begins."""


class ImageFileError(ValueError):
    """An image file that preprocessing leaves out; what fails only when it is decoded is ``images.ImageError``.

    Args:
        reason: One of few fixed phrases, for counting.
        detail: What was found.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        """One of few fixed phrases."""
        self.detail = detail
        """What was found."""


@dataclass(frozen=True)
class ImageFolder:
    """Reads image files below a folder, and never outside it.

    The file of a name is ``root/NAME``; if there is none and the name has no slash, ``root/NA/NAME``, where ``NA`` are
    its first two characters, for sets too large for one folder. An image that is named by its URL lies under
    ``url_file_name(URL)`` in the same way.
    """

    root: Path
    """The folder."""
    max_bytes: int = 64 << 20
    """Larger files are refused."""

    def read(self, name: str) -> bytes:
        """Return the bytes of an image file.

        Raises:
            ImageFileError: If the name leaves the folder, or there is no readable file of acceptable size.
            OSError: If the disk fails.
        """
        check_name(name)
        file = url_file_name(name) if is_url(name) else name
        try:
            return self._read_file(file)
        except ImageFileError as error:
            if error.reason != "missing file" or "/" in file or not file[:2].isalnum():
                raise
        try:
            return self._read_file(f"{file[:2]}/{file}")
        except ImageFileError as error:
            if error.reason == "missing file" and is_url(name):
                raise ImageFileError(error.reason, f"{file}: the SHA-256 of the URL") from error
            raise

    def _read_file(self, name: str) -> bytes:
        # As bytes: with LC_ALL=C, Python would encode file names as ASCII.
        root = os.path.realpath(os.fsencode(self.root))
        path = os.path.realpath(os.path.join(root, name.encode("utf-8")))
        if not path.startswith(os.path.join(root, b"")):
            raise ImageFileError("unsafe image name", "a symbolic link leads out of the image folder")
        try:
            info = os.stat(path)
            # Asked before opening: opening a named pipe would wait for ever.
            if not stat.S_ISREG(info.st_mode):
                raise ImageFileError("unreadable file", "not a regular file")
            check_size(info.st_size, self.max_bytes)
            with open(path, "rb") as stream:
                return stream.read()
        except OSError as error:
            if error.errno in ABSENT:
                raise ImageFileError(ABSENT[error.errno]) from error
            if error.errno in UNREADABLE:
                raise ImageFileError("unreadable file", os.strerror(error.errno or 0)) from error
            raise


def check_name(name: str) -> None:
    """Refuse a name that could lead out of the image folder, without touching the disk.

    URLs are looked up by their hash and never become a path, so that only what no file name can hold is refused.

    Raises:
        ImageFileError: If the name is empty, has a NUL or a lone surrogate, or, unless it is a URL, is absolute or has
            a parent part or a backslash.
    """
    path = PurePosixPath(name)
    forbidden = "\0" in name or any("\ud800" <= character <= "\udfff" for character in name)
    leaves = "\\" in name or path.is_absolute() or ".." in path.parts or not path.parts
    if forbidden or (leaves and not is_url(name)):
        raise ImageFileError("unsafe image name", ascii(name[:200]))


def check_size(size: int, max_bytes: int) -> None:
    """Refuse an image file of no bytes, or of more than ``max_bytes``.

    Raises:
        ImageFileError: ``file too large`` or ``not an image``.
    """
    if size > max_bytes:
        raise ImageFileError("file too large", f"{size} bytes; the limit is {max_bytes}")
    if size == 0:
        raise ImageFileError("not an image", "the file is empty")


def is_url(name: str) -> bool:
    """Return whether a name is a URL: it begins with a scheme and ``://``."""
    return URL.match(name) is not None


def url_file_name(url: str) -> str:
    """Return the name of the file that holds the image of a URL: the SHA-256 of the URL in UTF-8, 64 hex digits."""
    return hashlib.sha256(url.encode("utf-8")).hexdigest()
