"""What one run of preprocessing is told: inputs, tokenizer, treatment of images, output, processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lcl_megatron.config.errors import require
from lcl_megatron.data.preprocessing.image_processing import ImageRules
from lcl_megatron.data.readers.formats import FORMATS


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What is read, with which tokenizer, and where the corpus goes."""

    input: tuple[Path, ...]
    """Shards of the format. Their order is the order of the corpus."""
    format: str = "mmc4"
    """Format of the shards: see docs/data.md."""
    image_root: Path | None = None
    """Folder of image files, a tar, or a folder of tars; names that lead out of it are refused. None if the shards
    bring the images."""
    tokenizer_model: Path
    """SentencePiece model (tools/train_tokenizer.py)."""
    output: Path
    """Folder of the corpus to write."""
    engine: Literal["local", "ray"] = "local"
    """Where shards are encoded: processes of this machine, or a Ray cluster on a shared file system."""
    num_workers: int = 1
    """Shards encoded at a time. The result does not depend on it."""
    ray_address: str = ""
    """Cluster to use with engine ray (host:port, or auto); empty = start one on this machine with num_workers CPUs."""
    overwrite: bool = False
    """Replace a corpus that is already at the output."""
    check_images: Literal["header", "decode"] = "header"
    """How images are judged: by their header, or by decoding all of their pixels (about 1 ms more for each)."""
    resize_short_side: int = 0
    """Images whose shorter side is longer are resized to it and stored as JPEG; 0 = all stay as they are."""
    jpeg_quality: int = 90
    """Quality of the images that are stored again, 1 to 100."""
    max_rejected_image_share: float = 0.5
    """Stop when more than this share of the images cannot be used; 1 = never. A wrong image_root ends up here."""
    max_image_pixels: int = 64_000_000
    """Images whose header announces more pixels are left out."""
    max_image_bytes: int = 64 << 20
    """Larger image files are left out."""

    def __post_init__(self) -> None:
        require(self.format in FORMATS, f"format = {self.format!r} is unknown; known are {', '.join(sorted(FORMATS))}")
        self._check_inputs()
        self._check_image_root()
        require(self.num_workers >= 1, f"num_workers = {self.num_workers}; at least 1 is needed")
        require(
            not self.ray_address or self.engine == "ray",
            f"ray_address = {self.ray_address} has no meaning for engine {self.engine}; add --engine ray",
        )
        require(
            0 <= self.max_rejected_image_share <= 1,
            f"max_rejected_image_share = {self.max_rejected_image_share} is outside [0, 1]",
        )
        require(self.max_image_pixels >= 1 and self.max_image_bytes >= 1, "image limits must be at least 1")
        require(self.resize_short_side >= 0, f"resize_short_side = {self.resize_short_side} is negative; 0 = never")
        require(1 <= self.jpeg_quality <= 100, f"jpeg_quality = {self.jpeg_quality} is outside [1, 100]")

    @property
    def image_rules(self) -> ImageRules:
        """How images are judged and stored."""
        return ImageRules(
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            decode=self.check_images == "decode",
            resize_short_side=self.resize_short_side,
            jpeg_quality=self.jpeg_quality,
        )

    def _check_inputs(self) -> None:
        require(len(self.input) > 0, "no input: give --input SHARD [SHARD ...]")
        missing = [str(path) for path in self.input if not path.is_file()]
        require(not missing, f"{len(missing)} of {len(self.input)} inputs are no files: {', '.join(missing[:5])}")
        names = input_names(self.input)
        unnamed = [name for name in names if any("\ud800" <= character <= "\udfff" for character in name)]
        require(not unnamed, f"names of inputs that are not UTF-8: {unnamed[:5]!a}; rename the files")
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        require(not twice, f"inputs given more than once: {', '.join(twice[:5])}")

    def _check_image_root(self) -> None:
        if FORMATS[self.format].brings_images:
            require(
                self.image_root is None,
                f"image_root = {self.image_root}: shards of format {self.format} bring their images; leave it out",
            )
        else:
            require(
                self.image_root is not None,
                f"image_root is not given; shards of format {self.format} name images that lie elsewhere: "
                "give --image-root FOLDER",
            )
            root = self.image_root
            fits = root is None or root.is_dir() or (root.is_file() and root.name.endswith(".tar"))
            require(fits, f"image_root = {root} is not a folder, and not a .tar file")


def input_names(inputs: Sequence[Path]) -> list[str]:
    """Return what the inputs are called: their paths relative to the folder that all of them share."""
    paths = [os.path.abspath(path) for path in inputs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(os.path.relpath(path, common)).as_posix() for path in paths]
