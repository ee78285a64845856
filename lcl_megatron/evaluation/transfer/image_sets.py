"""Encoded images by number: files of a folder or members of tars, read and decoded in parallel.

What is read never leaves the folder (names come from the data), and an image that is missing or damaged ends the
evaluation with its name: leaving it out would change what a score is a share of.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.data.decoding.image_probe import ImageError
from lcl_megatron.data.image_stores.image_folder import ImageFileError, ImageFolder, is_url, url_file_name
from lcl_megatron.data.image_stores.image_store import ImageTars

Transform = Callable[[bytes, int], Tensor]
"""Encoded image and the key of its randomness -> (3, S, S) uint8 RGB; raises ImageError."""


class DataError(ValueError):
    """Data that cannot be used for evaluation; the message names the file."""


class ImageSet(Protocol):
    """Images by number."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def name(self, index: int) -> str:
        """Return what an image is called in messages: its path."""
        ...

    def read(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            DataError: it is missing or cannot be read.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digits that change when images are added, taken away, reordered or exchanged for others."""
        ...


@dataclass(frozen=True)
class FolderImages:
    """Image files below a folder."""

    root: Path
    """The folder."""
    names: Sequence[str]
    """Their names, relative to it."""

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise DataError(f"there is no image folder {self.root}; unpack the images or give another folder")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.root / self.names[index])

    def read(self, index: int) -> bytes:
        """Return the encoded image; raises ``DataError``."""
        try:
            return ImageFolder(self.root).read(self.names[index])
        except ImageFileError as error:
            raise DataError(f"{self.name(index)}: {error}; complete the images or give another folder") from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, sizes and times of change.

        Raises:
            DataError: files are missing; counts them and names the first.
        """
        states, missing = [str(self.root.resolve())], []
        for name in self.names:
            info = self._stat(name)
            if info is None:
                missing.append(name)
                continue
            states.append(f"{name}\0{info.st_size}\0{info.st_mtime_ns}")
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self)} images are not in {self.root}, the first is {missing[0]}; "
                "unpack the images completely or give another folder"
            )
        return _hash(states)

    def _stat(self, name: str) -> os.stat_result | None:
        """Return the state of a file where ``ImageFolder`` would look for it."""
        file = url_file_name(name) if is_url(name) else name
        for path in (self.root / file, self.root / file[:2] / file):
            with suppress(OSError):
                return path.stat()
        return None


@dataclass(frozen=True)
class StoredImages:
    """Images by name in indexed tars (``open_image_store``)."""

    store: ImageTars
    """Where they are."""
    names: Sequence[str]
    """Member names, or URLs as img2dataset recorded them."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.names)

    def name(self, index: int) -> str:
        """Return the name of an image."""
        return self.names[index]

    def read(self, index: int) -> bytes:
        """Return the encoded image; raises ``DataError``."""
        try:
            return self.store.read(self.names[index])
        except ImageFileError as error:
            raise DataError(f"{self.names[index]}: {error}; complete the tars") from error

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the names and of the tars' sizes and times of change."""
        return _hash([_tar_state(tar) for tar in self.store.tars] + list(self.names))


@dataclass(frozen=True)
class TarImages:
    """Members of plain tar files, by where their bytes lie."""

    tars: tuple[Path, ...]
    """The tars."""
    tar: np.ndarray
    """(N,) int32, which tar an image is in."""
    offset: np.ndarray
    """(N,) int64, where its bytes begin."""
    size: np.ndarray
    """(N,) int64, how many they are."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.tar)

    def name(self, index: int) -> str:
        """Return tar and place of an image."""
        return f"{self.tars[self.tar[index]]} at byte {self.offset[index]}"

    def read(self, index: int) -> bytes:
        """Return the encoded image; raises ``DataError``."""
        wanted = int(self.size[index])
        with open(self.tars[self.tar[index]], "rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), wanted, int(self.offset[index]))
        if len(data) != wanted:
            raise DataError(f"{self.name(index)}: the file ends inside the image; it was changed while in use")
        return data

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tars' names, sizes and times of change, and of the places of the images."""
        places = [hashlib.sha256(places.tobytes()).hexdigest() for places in (self.tar, self.offset, self.size)]
        return _hash([_tar_state(tar) for tar in self.tars] + places)


def _tar_state(tar: Path) -> str:
    info = tar.stat()
    return f"{tar.resolve()}\0{info.st_size}\0{info.st_mtime_ns}"


def _hash(states: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for state in states:
        digest.update(f"{state}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


class PixelReader:
    """Reads, decodes and transforms images of a set, many at the same time.

    One reader may be used by several threads; they share its own.
    """

    def __init__(self, images: ImageSet, transform: Transform, num_threads: int = 0) -> None:
        """Prepare to read.

        Args:
            images: the set.
            transform: what becomes of an image.
            num_threads: images decoded at the same time; 0 = one per CPU core.
        """
        self.images = images
        self._transform = transform
        self._threads = ThreadPoolExecutor(num_threads or os.cpu_count())

    def __call__(self, indices: np.ndarray, keys: np.ndarray | None = None) -> Tensor:
        """Return pixels (n, 3, S, S) uint8 RGB.

        Args:
            indices: (n,) of the set.
            keys: (n,) of the transform's randomness; None = 0 for all.

        Raises:
            DataError: an image cannot be read or decoded; names it.
        """
        return torch.stack(list(self._threads.map(self._pixels, *_arguments(indices, keys))))

    def read_good(self, indices: np.ndarray, keys: np.ndarray | None = None, size: int = 0) -> tuple[Tensor, Tensor]:
        """Return pixels (n, 3, S, S), and (n,) bool where the image is good; bad ones are blank.

        For training on images from the web, of which some are always damaged.

        Args:
            indices: see a call.
            keys: see a call.
            size: S of the blanks where no image is good, as in a small part of a batch; 0 = that is an error.

        Raises:
            DataError: no image is good; names the first.
        """
        found = list(self._threads.map(self._pixels_or_error, *_arguments(indices, keys)))
        pixels = [item for item in found if isinstance(item, Tensor)]
        if not pixels and not size:
            raise next(item for item in found if isinstance(item, DataError))
        blank = torch.zeros_like(pixels[0]) if pixels else torch.zeros(3, size, size, dtype=torch.uint8)
        is_good = torch.tensor([isinstance(item, Tensor) for item in found])
        return torch.stack([item if isinstance(item, Tensor) else blank for item in found]), is_good

    def _pixels(self, index: int, key: int) -> Tensor:
        data = self.images.read(index)
        try:
            return self._transform(data, key)
        except ImageError as error:
            raise DataError(
                f"{self.images.name(index)}: {error}; repair the image or take it out of the set"
            ) from error

    def _pixels_or_error(self, index: int, key: int) -> Tensor | DataError:
        try:
            return self._pixels(index, key)
        except DataError as error:
            return error


def _arguments(indices: np.ndarray, keys: np.ndarray | None) -> tuple[list[int], list[int]]:
    return indices.tolist(), [0] * len(indices) if keys is None else keys.tolist()
