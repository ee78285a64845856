"""Features of an encoder that is not trained: from files where they fit the disk, else computed when asked for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from lcl_megatron.evaluation.encoders.encoder import ImageEncoder
from lcl_megatron.evaluation.transfer.feature_cache import (
    FeatureFiles,
    Precision,
    cached_features,
    encode,
    evaluation_reader,
    feature_bytes,
)
from lcl_megatron.evaluation.transfer.image_sets import ImageSet, PixelReader
from lcl_megatron.evaluation.transfer.session import Session

GIB = 2**30


class FeatureSource(Protocol):
    """Patch features of a set of images, in two parts, so that the first can run ahead in a thread."""

    def read(self, indices: np.ndarray) -> Tensor:
        """Return what is read of some images: features, or pixels."""
        ...

    def features(self, read: Tensor) -> Tensor:
        """Return the features (n, P, C) of what was read, on the device; no gradient reaches the encoder."""
        ...


@dataclass(frozen=True)
class StoredFeatures:
    """Features from files."""

    files: FeatureFiles
    """The files."""
    session: Session
    """Says on which device they are wanted."""

    def read(self, indices: np.ndarray) -> Tensor:
        """Return features, on the CPU."""
        return self.files[indices]

    def features(self, read: Tensor) -> Tensor:
        """Return features on the device, in float32."""
        return read.to(self.session.replicas.device).float()


@dataclass(frozen=True)
class LiveFeatures:
    """Features that are computed each time."""

    encoder: ImageEncoder
    """In evaluation mode, on the device."""
    reader: PixelReader
    """Of the images."""
    precision: Precision
    """Of the computation."""

    def read(self, indices: np.ndarray) -> Tensor:
        """Return pixels."""
        return self.reader(indices)

    def features(self, read: Tensor) -> Tensor:
        """Return features on the device, in float32, rounded as stored ones are."""
        return encode(self.encoder, read, self.precision).float()


def open_features(
    encoder: ImageEncoder, images: ImageSet, session: Session, precision: Precision, max_cache_gib: float
) -> FeatureSource:
    """Return the features of a set of images.

    Args:
        encoder: in evaluation mode, on the session's device.
        images: the set.
        session: has the folder of the cache.
        precision: of computation and storage.
        max_cache_gib: larger features are not stored, nor are those that the disk has no room for twice.

    Raises:
        DataError: an image is missing or damaged.
        FeatureError: a feature is not finite.
    """
    needed = feature_bytes(encoder, len(images), precision)

    def fits() -> bool:
        session.cache.mkdir(parents=True, exist_ok=True)
        return needed <= max_cache_gib * GIB and 2 * needed <= shutil.disk_usage(session.cache).free

    size = f"features of {len(images):,} images, {needed / GIB:.2f} GiB,"
    if session.replicas.from_first(session.replicas.is_first and fits()):
        session.say(f"{encoder.name}: {size} are read from {session.cache}, or computed first")
        files = cached_features(encoder, images, session.cache, session.replicas, precision=precision)
        return StoredFeatures(files, session)
    session.say(f"{encoder.name}: {size} are not stored (max_cache_gib = {max_cache_gib:g}); computed in every epoch")
    return LiveFeatures(encoder, evaluation_reader(encoder, images), precision)
