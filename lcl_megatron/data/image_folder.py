"""Encoded images in a folder, by names that come from untrusted records.

A name is data from the web. It may say ``../../etc/passwd``, be absolute, or lead through a symbolic link, and a file
called ``.jpg`` may hold an HTML page or announce 10^10 pixels. Nothing is decoded here: a file that is cut short in
the middle is found when it is decoded for training.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
"""Pillow formats that are accepted; others (FITS, EPS, PSD, ...) bring rarely tested decoders."""
ABSENT = {errno.ENOENT: "missing file", errno.ENOTDIR: "missing file"}
"""Errors that mean that there is no such file, with their reason."""
UNREADABLE = {errno.ENAMETOOLONG, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EINVAL}
"""Errors that are the file's own. Others (EIO, ESTALE, EMFILE) are the machine's, and stop the run."""


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
    """Reads image files below a folder, and never outside it."""

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
            if info.st_size > self.max_bytes:
                raise ImageFileError("file too large", f"{info.st_size} bytes; the limit is {self.max_bytes}")
            with open(path, "rb") as stream:
                data = stream.read()
        except OSError as error:
            if error.errno in ABSENT:
                raise ImageFileError(ABSENT[error.errno]) from error
            if error.errno in UNREADABLE:
                raise ImageFileError("unreadable file", os.strerror(error.errno or 0)) from error
            raise
        if not data:
            raise ImageFileError("not an image", "the file is empty")
        return data


def probe_image(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return width and height in pixels from an image's header; pixels are not decoded.

    Raises:
        ImageFileError: If the bytes are no image of an accepted format, or announce too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        raise ImageFileError("too many pixels", str(error)) from error
    # Pillow's parsers raise OSError, SyntaxError, ValueError, struct.error, IndexError ... on damaged headers.
    except Exception as error:
        raise ImageFileError("not an image", f"begins with {data[:16]!r}") from error
    if width * height > max_pixels:
        raise ImageFileError("too many pixels", f"{width} x {height}; the limit is {max_pixels}")
    return width, height


def check_name(name: str) -> None:
    """Refuse a name that could lead out of the image folder, without touching the disk.

    Raises:
        ImageFileError: If the name is empty, absolute, has a parent part, a backslash, a NUL or a lone surrogate.
    """
    path = PurePosixPath(name)
    forbidden = "\\" in name or "\0" in name or any("\ud800" <= character <= "\udfff" for character in name)
    if forbidden or path.is_absolute() or ".." in path.parts or not path.parts:
        raise ImageFileError("unsafe image name", ascii(name[:200]))
