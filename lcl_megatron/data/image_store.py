"""Where the images of a data set lie: by name to encoded bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from lcl_megatron.data.image_folder import ImageFolder


class ImageStore(Protocol):
    """Reads images by the names that records give them."""

    def read(self, name: str) -> bytes:
        """Return the encoded bytes of an image.

        Raises:
            ImageFileError: If there is no such image, or it may not or cannot be read.
            OSError: If the disk fails.
        """
        ...


def open_image_store(image_root: Path, max_bytes: int) -> ImageStore:
    """Return the store of the images below ``image_root``.

    Args:
        image_root: Folder of image files.
        max_bytes: Larger images are refused.
    """
    return ImageFolder(image_root, max_bytes)
