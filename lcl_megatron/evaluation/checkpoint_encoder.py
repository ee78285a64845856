"""The frozen vision encoder of a training checkpoint, as a function from pixels to features."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcl_megatron.checkpoint import native
from lcl_megatron.config import LossConfig, ParallelConfig, RunConfig
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
        """Return the mean over patches of the tower's features, (N, C), of uint8 images (N, 3, P, P)."""
        return self.engine.model.vision(images.to(self.engine.device)).mean(dim=1).float().cpu()


@contextmanager
def frozen_encoders(checkpoint: Path) -> Iterator[tuple[FrozenEncoder, FrozenEncoder]]:
    """Yield a checkpoint's encoder and, for comparison, the same encoder before the first step.

    The checkpoint may come from any layout. The untrained encoder has the run's own initial weights.

    Args:
        checkpoint: a ``step-NNNNNNNN`` folder, or a folder that holds some; the newest is taken.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    found = native.find_latest(checkpoint)
    if found is None:
        raise native.CheckpointError(f"no complete checkpoint (step-NNNNNNNN) in {checkpoint}")
    config = _single_process(native.read_config(found))
    groups = engines.start(config)
    try:
        trained, untrained = (engines.build_engine(config, groups) for _ in range(2))
        native.load_model(found, trained)
        for engine in (trained, untrained):
            engine.ddp.eval()
        yield FrozenEncoder(trained), FrozenEncoder(untrained)
    finally:
        groups.destroy()


def _single_process(config: RunConfig) -> RunConfig:
    """Return the configuration for one process in float32."""
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        loss=LossConfig(),
        training=dataclasses.replace(config.training, precision="fp32", transformer_impl="torch"),
    )
