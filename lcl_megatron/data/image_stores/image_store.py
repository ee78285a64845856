"""Where the images of a data set lie: by name to encoded bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.image_stores.image_folder import ImageFileError, ImageFolder, check_name, check_size, is_url
from lcl_megatron.data.image_stores.tar_index import open_tar_index
from lcl_megatron.data.image_stores.tar_members import COMPRESSED


class ImageStore(Protocol):
    """Reads images by the names that records give them."""

    def read(self, name: str) -> bytes:
        """Return the encoded bytes of an image.

        Raises:
            ImageFileError: If there is no such image, or it may not or cannot be read.
            OSError: If the disk fails.
        """
        ...


class ImageTars:
    """Reads images out of plain tars, by member name or by the URL that img2dataset recorded.

    Args:
        tars: The tars; their order decides between images of the same URL.
        index_folder: Where their index is kept.
        max_bytes: Larger images are refused.

    Raises:
        OSError: If a tar cannot be read, or is damaged.
    """

    def __init__(self, tars: Sequence[Path], index_folder: Path, max_bytes: int) -> None:
        self.tars = tuple(tars)
        """The tars."""
        self.max_bytes = max_bytes
        """Larger images are refused."""
        self._index = open_tar_index(self.tars, index_folder)

    def read(self, name: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageFileError: If the name is unsafe or not there, or stands for several images, or the image is empty or
                too large.
            OSError: If the disk fails, or the tar was changed while in use.
        """
        check_name(name)
        places = self._index.find(name)
        if not places:
            raise ImageFileError(
                "missing file", f"{'URL' if is_url(name) else 'member'} of none of {len(self.tars)} tars"
            )
        if len(places) > 1 and not is_url(name):
            # Two files of one name are two images; taking one of them would pair texts with wrong images.
            found = sorted({self.tars[place.tar].name for place in places})
            raise ImageFileError(
                "ambiguous image name", f"{len(places)} members of that name in {', '.join(found[:3])}"
            )
        place = places[0]
        check_size(place.size, self.max_bytes)
        with open(self.tars[place.tar], "rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), place.size, place.offset)
            while len(data) < place.size:
                more = os.pread(stream.fileno(), place.size - len(data), place.offset + len(data))
                if not more:
                    raise OSError(f"{self.tars[place.tar]} ends inside {name}: it was changed while in use")
                data += more
        return data


def open_image_store(image_root: Path, max_bytes: int) -> ImageStore:
    """Return the store of the images of a data set.

    Args:
        image_root: Folder of image files; or a tar; or a folder that holds tars, whose other files are not looked at.
        max_bytes: Larger images are refused.

    Raises:
        ConfigError: If it is none of these.
        OSError: If a tar cannot be read, or is damaged.
    """
    if image_root.is_dir():
        stat = image_root.stat()
        tars, compressed = _list_tars(image_root, stat.st_ino, stat.st_mtime_ns)
        if tars:
            return ImageTars([image_root / name for name in tars], image_root / ".index", max_bytes)
        if not compressed:
            return ImageFolder(image_root, max_bytes)
        image_root /= compressed[0]
    elif image_root.is_file() and image_root.name.endswith(".tar"):
        return ImageTars([image_root], image_root.with_name(f".{image_root.name}.index"), max_bytes)
    if image_root.name.endswith(COMPRESSED):
        raise ConfigError(f"{image_root} is a compressed tar, which cannot be read at random; decompress it: gunzip")
    raise ConfigError(f"image_root = {image_root} is no folder of images, no .tar, and no folder of .tar files")


@lru_cache(maxsize=16)
def _list_tars(folder: Path, inode: int, modified: int) -> tuple[list[str], list[str]]:
    """Return the names of the plain and of the compressed tars in a folder, sorted.

    Cached while the folder does not change: listing a flat folder of millions of images takes seconds, and a store is
    opened for every shard.
    """
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.endswith((".tar", *COMPRESSED))]
    plain = sorted(name for name in names if name.endswith(".tar"))
    return plain, sorted(name for name in names if not name.endswith(".tar"))
