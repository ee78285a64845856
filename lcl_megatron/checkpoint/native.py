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
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lcl_megatron.checkpoint import optimizer_state
from lcl_megatron.checkpoint.folders import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    CheckpointError,
    Progress,
    commit_folder,
    find_latest,
    read_config,
    step_folder,
)
from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import to_toml
from lcl_megatron.config.validate import architecture, architecture_difference
from lcl_megatron.model.lcl import LCLModel
from lcl_megatron.parallel.engine import Engine

logger = logging.getLogger(__name__)

__all__ = [
    "CONFIG_FILE",
    "TOKENIZER_FILE",
    "CheckpointError",
    "Progress",
    "Trainable",
    "check_architecture",
    "find_latest",
    "load",
    "load_model",
    "model_state",
    "read_config",
    "save",
    "step_folder",
]


@dataclass(frozen=True)
class Trainable:
    """What a checkpoint holds, in memory."""

    engine: Engine
    """This rank's part of the model."""
    optimizer: MegatronOptimizer
    """Its optimizer."""
    scheduler: OptimizerParamScheduler
    """Its schedule."""


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
        commit_folder(staging, final)
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
    _fill(engine, state["model"])
    optimizer_state.load_sharded_state(trainable.optimizer, model_state(engine), state["optimizer"])
    trainable.scheduler.load_state_dict(state["scheduler"])
    return Progress(**state["progress"])


def load_model(checkpoint: Path, engine: Engine) -> None:
    """Fill only the model from a checkpoint of any layout; collective over all ranks."""
    check_architecture(checkpoint, engine.config)
    loaded = dist_checkpointing.load({"model": model_state(engine)}, str(checkpoint))
    _fill(engine, loaded["model"])


def _state(trainable: Trainable, progress: Progress, is_loading: bool) -> dict[str, Any]:
    model = model_state(trainable.engine)
    return {
        "model": model,
        "optimizer": optimizer_state.sharded_state(trainable.optimizer, model, is_loading),
        "scheduler": trainable.scheduler.state_dict(),
        "progress": asdict(progress),
    }


def model_state(engine: Engine) -> ShardedStateDict:
    """Return this rank's part of the model's tensors, sharded, named as in a checkpoint; they share its memory."""
    return {name: tensor for model in engine.models for name, tensor in _stage_state(engine, model).items()}


def _stage_state(engine: Engine, model: LCLModel) -> ShardedStateDict:
    """Return the part of ``model_state`` that is in one stage."""
    state: ShardedStateDict = model.sharded_state_dict(metadata={"dp_cp_group": engine.groups.collection.dp_cp})
    return state


def _fill(engine: Engine, state: dict[str, Any]) -> None:
    """Fill every stage of this rank from the state of all of them."""
    for model in engine.models:
        model.load_state_dict({name: state[name] for name in _stage_state(engine, model)}, strict=True)
