"""The frozen vision encoder of a training checkpoint, as a function from pixels to features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcl_megatron.evaluation.checkpoint_engine import newest_checkpoint, trained_engine
from lcl_megatron.evaluation.features import extract_features
from lcl_megatron.evaluation.labelled_images import DecodedImages, read_labels
from lcl_megatron.evaluation.probes import Examples, ProbeReport, probe_encoder
from lcl_megatron.model.parts import present
from lcl_megatron.parallel import engine as engines


@dataclass(frozen=True)
class FrozenEncoder:
    """A vision tower in evaluation mode, in float32, on one process."""

    engine: engines.Engine
    """Holds the whole model."""

    @property
    def image_size(self) -> int:
        """Side of the images it reads, in pixels."""
        return self.engine.config.vision.image_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the mean over patches of the tower's features, (N, C) float32 on the CPU.

        Args:
            images: (N, 3, size, size) uint8 RGB.
        """
        return present(self.engine.model.vision)(images.to(self.engine.device)).mean(dim=1).float().cpu()


@contextmanager
def frozen_encoders(checkpoint: Path) -> Iterator[tuple[FrozenEncoder, FrozenEncoder]]:
    """Yield a checkpoint's encoder and, for comparison, the same encoder before the first step.

    The checkpoint may come from any layout. The untrained encoder has the run's own initial weights.

    Args:
        checkpoint: a ``step-NNNNNNNN`` folder, or a folder that holds some; the newest is taken.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    with trained_engine(*newest_checkpoint(checkpoint)) as trained:
        untrained = engines.build_engine(trained.config, trained.groups)
        untrained.eval()
        yield FrozenEncoder(trained), FrozenEncoder(untrained)


def probe_checkpoint(checkpoint: Path, labels: Path, image_root: Path, splits: tuple[str, str]) -> list[ProbeReport]:
    """Return the probes' reports on the trained and on the untrained encoder.

    Args:
        checkpoint: as for ``frozen_encoders``.
        labels: CSV file with the columns ``image_name``, ``split``, ``label``.
        image_root: folder of the images.
        splits: the split that the probes are fitted on, and the one that is scored.

    Raises:
        CheckpointError: there is no complete checkpoint.
        LabelError: the labels are damaged.
        DataError: an image is missing or cannot be decoded.
        ValueError: the splits are too small to fit the probes.
    """
    read = [read_labels(labels, split) for split in splits]
    reports = []
    with frozen_encoders(checkpoint) as encoders:
        for name, encoder in zip(("trained", "untrained"), encoders, strict=True):
            train, test = (
                Examples(
                    extract_features(encoder, DecodedImages(images, image_root, encoder.image_size)),
                    torch.from_numpy(images.labels),
                )
                for images in read
            )
            reports.append(probe_encoder(name, train, test))
    return reports
