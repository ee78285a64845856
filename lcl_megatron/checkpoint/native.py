"""Training checkpoints: saved at any tensor, pipeline and data-parallel size, loaded at any other.

    SAVE/step-00001000/            complete: a folder gets this name only when everything in it is on disk
        *.distcp, .metadata, common.pt, metadata.json      megatron-core's distributed checkpoint
        run.toml                                           the whole resolved configuration
        tokenizer.model                                    the corpus's tokenizer
    SAVE/.staging-step-00001000/   being written, or left by a run that was killed; never read

megatron-core plans and writes the shards. It overwrites in place and has no marker that survives a kill in every
case, so that writing goes to a staging folder that is renamed when complete.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lcl_megatron.checkpoint import optimizer_state
from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import from_toml, to_toml
from lcl_megatron.config.validate import architecture, architecture_difference
from lcl_megatron.parallel.engine import Engine

logger = logging.getLogger(__name__)

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
CONFIG_FILE = "run.toml"
TOKENIZER_FILE = "tokenizer.model"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used for this run."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come. With the seed it determines everything that follows."""

    step: int = 0
    """Optimizer steps done."""
    consumed_rows: int = 0
    """Rows of the data order that have been trained on; where the data order goes on under any layout."""
    consumed_images: int = 0
    """Images that have been trained on."""
    data: dict[str, str] = field(default_factory=dict)
    """All that decides the sequence of rows, by name: corpora, seed, mixture and composition."""


@dataclass(frozen=True)
class Trainable:
    """What a checkpoint holds, in memory."""

    engine: Engine
    """This rank's part of the model."""
    optimizer: MegatronOptimizer
    """Its optimizer."""
    scheduler: OptimizerParamScheduler
    """Its schedule."""


def step_folder(root: str | Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return Path(root) / f"step-{step:08d}"


def find_latest(root: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step under ``root``, or ``root`` itself if it is one."""
    root = Path(root)
    if (root / CONFIG_FILE).is_file():
        return root
    if not root.is_dir():
        return None
    complete = [folder for folder in root.iterdir() if _STEP_FOLDER.fullmatch(folder.name) and folder.is_dir()]
    return max(complete, key=lambda folder: int(folder.name.split("-")[1]), default=None)


def read_config(checkpoint: Path) -> RunConfig:
    """Return the configuration of the run that wrote a checkpoint.

    Raises:
        CheckpointError: the folder is no checkpoint.
    """
    path = checkpoint / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} has no {CONFIG_FILE}; expected a step-NNNNNNNN folder of a training run")
    return from_toml(path.read_text(encoding="utf-8"), str(path))


def check_architecture(checkpoint: Path, config: RunConfig) -> None:
    """Raise CheckpointError, naming every differing field, unless the checkpoint's model has this architecture."""
    differences = architecture_difference(architecture(read_config(checkpoint)), architecture(config))
    if differences:
        listed = "\n  ".join(differences)
        raise CheckpointError(
            f"{checkpoint} holds another architecture than this run:\n  {listed}\n"
            f"repeat the run's settings with --config {checkpoint / CONFIG_FILE}, or start in another folder"
        )


def save(root: str | Path, trainable: Trainable, progress: Progress, tokenizer: bytes) -> Path:
    """Write a checkpoint and return its folder; collective over all ranks.

    Nothing happens if this step has been saved before: a checkpoint is never written in place.
    """
    engine = trainable.engine
    final = step_folder(root, progress.step)
    staging = final.with_name(f".staging-{final.name}")
    # Rank 0 decides: file systems show a new folder to different nodes at different times.
    if engine.groups.first_rank_says(final.exists()):
        return final
    if engine.groups.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    engine.groups.barrier()
    dist_checkpointing.save(_state(trainable, progress, is_loading=False), str(staging))
    engine.groups.barrier()
    if engine.groups.rank == 0:
        (staging / CONFIG_FILE).write_text(to_toml(engine.config), encoding="utf-8")
        (staging / TOKENIZER_FILE).write_bytes(tokenizer)
        for path in [*staging.iterdir(), staging]:
            _flush_to_disk(path)
        staging.rename(final)
        _flush_to_disk(final.parent)
    engine.groups.barrier()
    return final


def load(checkpoint: Path, trainable: Trainable) -> Progress:
    """Fill model, optimizer and schedule from a checkpoint of any layout; collective over all ranks.

    Raises:
        CheckpointError: the checkpoint's architecture differs.
    """
    engine = trainable.engine
    check_architecture(checkpoint, engine.config)
    state = dist_checkpointing.load(_state(trainable, Progress(), is_loading=True), str(checkpoint))
    engine.ddp.module.load_state_dict(_unprefixed(state["model"]), strict=True)
    optimizer_state.load_sharded_state(trainable.optimizer, _model_state(engine), state["optimizer"])
    trainable.scheduler.load_state_dict(state["scheduler"])
    return Progress(**state["progress"])


def load_model(checkpoint: Path, engine: Engine) -> None:
    """Fill only the model from a checkpoint of any layout; collective over all ranks."""
    check_architecture(checkpoint, engine.config)
    loaded = dist_checkpointing.load({"model": _model_state(engine)}, str(checkpoint))
    engine.ddp.module.load_state_dict(_unprefixed(loaded["model"]), strict=True)


def _state(trainable: Trainable, progress: Progress, is_loading: bool) -> dict[str, Any]:
    model = _model_state(trainable.engine)
    return {
        "model": model,
        "optimizer": optimizer_state.sharded_state(trainable.optimizer, model, is_loading),
        "scheduler": trainable.scheduler.state_dict(),
        "progress": asdict(progress),
    }


def _model_state(engine: Engine) -> ShardedStateDict:
    """Return this rank's part of the model's tensors, named as in the whole model."""
    state: ShardedStateDict = engine.ddp.module.sharded_state_dict(
        metadata={"dp_cp_group": engine.groups.collection.dp_cp}
    )
    return state


def _unprefixed(state: dict[str, Any]) -> dict[str, Any]:
    """Return the names that the stage's module uses for the names of the whole model."""
    return {f"model.{name}": value for name, value in state.items()}


def _flush_to_disk(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
