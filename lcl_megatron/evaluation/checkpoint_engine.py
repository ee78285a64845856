"""A training checkpoint of any layout, opened for evaluation: the whole model in float32 on one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.folders import read_config
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.reader import newest_whole
from lcl_megatron.config import ParallelConfig, RunConfig
from lcl_megatron.parallel import engine as engines


def newest_checkpoint(folder: Path) -> tuple[Path, RunConfig]:
    """Return a checkpoint, and its run's configuration for one process.

    Args:
        folder: a ``step-NNNNNNNN`` folder, or a folder that holds some; the newest whole one is taken.

    Raises:
        CheckpointError: there is no complete checkpoint, or all are damaged.
    """
    found = newest_whole(folder)
    if found is None:
        raise CheckpointError(f"no complete checkpoint (step-NNNNNNNN) in {folder}")
    return found, single_process(read_config(found))


def single_process(config: RunConfig) -> RunConfig:
    """Return the configuration for one process in float32; the vision tower's own section stays as it was."""
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(),
        training=dataclasses.replace(config.training, precision="fp32", transformer_impl="torch"),
    )


@contextmanager
def trained_engine(checkpoint: Path, config: RunConfig) -> Iterator[engines.Engine]:
    """Yield the model of a checkpoint in evaluation mode; its process groups end with the block.

    Args:
        checkpoint: see ``newest_checkpoint``.
        config: see there.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    groups = engines.start(config)
    try:
        engine = engines.build_engine(config, groups)
        native.load_model(checkpoint, engine)
        engine.eval()
        yield engine
    finally:
        groups.destroy()
