"""Patch features of a frozen encoder, computed once and kept in files that are read through the page cache.

A cache is a folder named after a hash of the encoder's weights, its transform, the precision and the images. It holds
parts of ``PART_IMAGES`` images; a part is written under another name and renamed when it is complete, so that a killed
run leaves only complete parts, and the next one computes what is missing. Ranks share the parts among them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.evaluation.encoders.encoder import ImageEncoder
from lcl_megatron.evaluation.transfer.image_sets import ImageSet, PixelReader
from lcl_megatron.parallel.replicas import Replicas

PART_IMAGES = 1024
"""Images of a file."""
Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""How features are stored; also how the encoder computes (autocast)."""


class FeatureError(ValueError):
    """Features that are not finite, or do not fit the disk."""


class FeatureFiles:
    """The features of N images, (N, P, C), on disk."""

    def __init__(self, parts: Sequence[Path], num_images: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Open complete parts; nothing is read yet."""
        self._bytes_per_image = shape[0] * shape[1] * dtype.itemsize
        self._parts = [np.memmap(part, np.uint8, "r").reshape(-1, self._bytes_per_image) for part in parts]
        self._num_images, self._shape, self._dtype = num_images, shape, dtype

    def __len__(self) -> int:
        """Return N."""
        return self._num_images

    def __getitem__(self, indices: np.ndarray) -> Tensor:
        """Return features (n, P, C) of some images, in the stored dtype, on the CPU.

        Args:
            indices: (n,) integers in [0, N).
        """
        rows = np.empty((len(indices), self._bytes_per_image), np.uint8)
        for row, index in enumerate(indices.tolist()):
            rows[row] = self._parts[index // PART_IMAGES][index % PART_IMAGES]
        return torch.from_numpy(rows).view(self._dtype).view(len(indices), *self._shape)


def evaluation_reader(encoder: ImageEncoder, images: ImageSet) -> PixelReader:
    """Return a reader of images by the evaluation transform of an encoder's library."""
    return PixelReader(images, lambda data, _key: encoder.preprocessing(data))


def feature_bytes(encoder: ImageEncoder, num_images: int, precision: Precision) -> int:
    """Return the size of the features of so many images."""
    return num_images * encoder.num_patches * encoder.width * DTYPES[precision].itemsize


def cached_features(
    encoder: ImageEncoder,
    images: ImageSet,
    folder: Path,
    replicas: Replicas,
    *,
    precision: Precision = "fp32",
    batch_size: int = 64,
) -> FeatureFiles:
    """Return the features of all images, computing those that are not there.

    Args:
        encoder: in evaluation mode, on the replica's device.
        images: N images.
        folder: where caches are kept.
        replicas: ranks that share the work and see the same folder.
        precision: of computation and storage.
        batch_size: images encoded at the same time by a rank; bounds the memory.

    Raises:
        DataError: an image is missing or damaged.
        FeatureError: a feature is not finite.
        OSError: the disk is full or fails.

    Parallel: two barriers.
    """
    fingerprints = replicas.from_first((encoder.fingerprint(), images.fingerprint))
    key = hashlib.sha256("\0".join((*fingerprints, precision)).encode()).hexdigest()[:16]
    cache, dtype = folder / key, DTYPES[precision]
    cache.mkdir(parents=True, exist_ok=True)
    parts = [cache / f"part-{number:06d}" for number in range(-(-len(images) // PART_IMAGES))]
    counts = [min(PART_IMAGES, len(images) - number * PART_IMAGES) for number in range(len(parts))]
    sizes = [feature_bytes(encoder, count, precision) for count in counts]
    # A copy of a cache, or a power cut, may leave parts that are too short.
    missing = replicas.from_first(
        [number for number, part in enumerate(parts) if not part.is_file() or part.stat().st_size != sizes[number]]
    )
    reader = evaluation_reader(encoder, images)
    for number in missing[replicas.rank :: replicas.size]:
        indices = np.arange(number * PART_IMAGES, min((number + 1) * PART_IMAGES, len(images)))
        _write_part(encoder, reader, indices, parts[number], precision, batch_size)
    replicas.barrier()
    return FeatureFiles(parts, len(images), (encoder.num_patches, encoder.width), dtype)


def _write_part(
    encoder: ImageEncoder, reader: PixelReader, indices: np.ndarray, part: Path, precision: Precision, batch_size: int
) -> None:
    # Two runs may compute the same part; each renames a whole one.
    temporary = part.with_name(f"{part.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            for begin in range(0, len(indices), batch_size):
                batch = indices[begin : begin + batch_size]
                features = encode(encoder, reader(batch), precision)
                finite = torch.isfinite(features).flatten(1).all(dim=1)
                if not bool(finite.all()):
                    image = reader.images.name(int(batch[int((~finite).nonzero()[0])]))
                    raise FeatureError(
                        f"{encoder.name}: a feature of {image} is not finite; its weights are damaged or overflow"
                    )
                stream.write(features.contiguous().cpu().view(torch.uint8).numpy().tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, part)
    finally:
        temporary.unlink(missing_ok=True)


@torch.no_grad()
def encode(encoder: ImageEncoder, pixels: Tensor, precision: Precision) -> Tensor:
    """Return (N, P, C) features of uint8 pixels (N, 3, S, S), on the encoder's device, as they would be stored."""
    device = encoder.device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        features: Tensor = encoder(pixels.to(device, non_blocking=True))
    return features.to(DTYPES[precision])
