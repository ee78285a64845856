"""Training checkpoints: saved at any tensor, pipeline, context and data-parallel size, loaded at any other.

    SAVE/step-00001000/            complete: a folder gets this name only when everything in it is on disk
        manifest.json              size and SHA-256 of every file (``manifest.py``)
        index.json                 where each tensor's pieces lie (``shard_file.py``)
        state.json                 progress, schedule, Adam's step, what guards the run
        run.toml                   the whole resolved configuration
        tokenizer.model            the corpus's tokenizer
        vision-weights-00000.safetensors, language-moments-00003.safetensors, ...     PART-KIND-RANK (``held.py``)
    SAVE/.staging-step-00001000-ATTEMPT/   being written, or left by a run that was killed; never read
    SAVE/.lease                    who writes into the folder (``lease.py``)

megatron-core says which rank holds what (``sharded_state_dict``). Its own storage (0.16.1) detects no damage, writes
in place, unpickles what it reads, and can hang when a writer dies; so files, manifest and commit are ours. Each rank
writes what it holds; no tensor is gathered.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lcl_megatron.checkpoint.folders import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Progress,
    read_config,
    step_folder,
)
from lcl_megatron.checkpoint.held import Held, files_of, fill, held_weights
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.optimizer_state import adam_step, held_state, set_adam_step
from lcl_megatron.checkpoint.reader import STATE_FILE, CheckpointReader
from lcl_megatron.checkpoint.saver import Saver
from lcl_megatron.checkpoint.writer_process import NewFile
from lcl_megatron.config import CheckpointConfig, RunConfig
from lcl_megatron.config.toml import to_toml
from lcl_megatron.config.validate import architecture, architecture_difference
from lcl_megatron.parallel.engine import Engine


class Stateful(Protocol):
    """Has a state beside tensors that a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, of values that JSON holds exactly; the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""


@dataclass(frozen=True)
class Trainable:
    """What a checkpoint holds, in memory."""

    engine: Engine
    """This rank's part of the model."""
    optimizer: MegatronOptimizer
    """Its optimizer."""
    scheduler: OptimizerParamScheduler
    """Its schedule."""
    guard: Stateful | None = None
    """What it knows of the run's gradients so far."""


def check_architecture(checkpoint: Path, config: RunConfig) -> None:
    """Raise CheckpointError, naming every differing field, unless the checkpoint's model has this architecture."""
    differences = architecture_difference(architecture(read_config(checkpoint)), architecture(config))
    if differences:
        listed = "\n  ".join(differences)
        raise CheckpointError(
            f"{checkpoint} holds another architecture than this run:\n  {listed}\n"
            f"repeat the run's settings with --config {checkpoint / CONFIG_FILE}, or start in another folder"
        )


def files(trainable: Trainable, progress: Progress, tokenizer: bytes) -> list[NewFile]:
    """Return the files that this rank writes of a checkpoint; no communication.

    Args:
        trainable: what is saved.
        progress: how far the run has come.
        tokenizer: SentencePiece model of the corpus.
    """
    rank = trainable.engine.groups.rank
    new = files_of(_held(trainable), rank)
    if rank == 0:
        state = {
            "progress": asdict(progress),
            "scheduler": trainable.scheduler.state_dict(),
            "adam_step": adam_step(trainable.optimizer),
            "guard": trainable.guard.state_dict() if trainable.guard is not None else {},
        }
        new += [
            _file(STATE_FILE, json.dumps(state, indent=1).encode()),
            _file(CONFIG_FILE, to_toml(trainable.engine.config).encode()),
            _file(TOKENIZER_FILE, tokenizer),
        ]
    return new


def save(root: str | Path, trainable: Trainable, progress: Progress, tokenizer: bytes) -> Path:
    """Write one checkpoint, wait until it is complete, and return its folder; collective over all ranks.

    Nothing happens if this step has been saved before: a checkpoint is never written in place. Runs use a ``Saver``,
    which does not wait.

    Raises:
        SaveError: it could not be written.
    """
    groups = trainable.engine.groups
    config = CheckpointConfig(save=str(root), on_save_error="stop")
    saver = Saver(config, groups, groups.shared_nonce(), lease=None)
    try:
        saver.begin(progress.step, lambda: files(trainable, progress, tokenizer))
        saver.finish()
    finally:
        saver.close()
    return step_folder(root, progress.step)


def load(checkpoint: Path, trainable: Trainable, verify: bool = True) -> Progress:
    """Fill model, optimizer, schedule and guard from a checkpoint of any layout; no communication.

    Args:
        checkpoint: its folder.
        trainable: what is filled.
        verify: compare the files that are read with the manifest; off where that has just been done.

    Raises:
        CheckpointError: the checkpoint's architecture differs.
        DamagedCheckpointError: it is damaged.
    """
    reader = CheckpointReader(checkpoint, verify)
    state = reader.state()
    check_architecture(checkpoint, trainable.engine.config)
    fill(_held(trainable), reader, precise=True)
    set_adam_step(trainable.optimizer, int(state["adam_step"]))
    trainable.scheduler.load_state_dict(state["scheduler"])
    if trainable.guard is not None and state["guard"]:
        trainable.guard.load_state_dict(state["guard"])
    return Progress(**state["progress"])


def load_model(checkpoint: Path, engine: Engine) -> None:
    """Fill only the model from a checkpoint of any layout; no communication. Raises as ``load``."""
    reader = CheckpointReader(checkpoint)
    check_architecture(checkpoint, engine.config)
    fill(held_weights(model_state(engine)), reader)


def _held(trainable: Trainable) -> list[Held]:
    """Return all tensors of this rank; the weights first: in fp32, the optimizer's values are the same memory."""
    model = model_state(trainable.engine)
    return [*held_weights(model), *held_state(trainable.optimizer, model)]


def _file(name: str, content: bytes) -> NewFile:
    def fill_in(memory: memoryview) -> None:
        memory[:] = content

    return NewFile(name, len(content), fill_in)


def model_state(engine: Engine) -> ShardedStateDict:
    """Return this rank's part of the model's tensors, sharded, named as in a checkpoint; they share its memory."""
    state: ShardedStateDict = {}
    for model in engine.models:
        state |= model.sharded_state_dict(metadata={"dp_cp_group": engine.groups.collection.dp_cp})
    return state
