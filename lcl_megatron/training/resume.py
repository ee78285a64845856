"""Where a run goes on from: the newest whole checkpoint, on the data that it was trained on."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import asdict
from pathlib import Path

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.folders import Progress, complete_checkpoints, read_config
from lcl_megatron.checkpoint.manifest import (
    CheckpointError,
    Damage,
    DamagedCheckpointError,
    UnreadableCheckpointError,
    damage_of,
    read_manifest,
)
from lcl_megatron.config import CheckpointConfig, RunConfig
from lcl_megatron.config.toml import section_types
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.parallel.groups import ProcessGroups

logger = logging.getLogger(__name__)

DAMAGED_PREFIX = ".damaged-"
"""A damaged checkpoint of the run's own folder is put aside under this name, so that its step can be saved again."""


def checkpoint_to_resume(config: CheckpointConfig, groups: ProcessGroups) -> Path | None:
    """Return the newest whole checkpoint, None if the run begins; collective over all ranks, on the host.

    ``save`` is looked at first: a job that was started with --load and is started again must not lose what it has done
    since. Damaged checkpoints are named, and put aside in ``save``.

    Raises:
        DamagedCheckpointError: there are checkpoints, and all of them are damaged: the run must not begin anew.
        CheckpointError: ``checkpoint.load`` holds none.
    """
    for root in filter(None, (config.save, config.load)):
        # Rank 0 looks, for all: file systems show a new folder to different nodes at different times.
        found = json.loads(groups.first_rank_text(json.dumps([str(path) for path in complete_checkpoints(root)])))
        if found:
            return _newest_whole([Path(path) for path in found], config, groups, may_put_aside=root == config.save)
    if config.load:
        raise CheckpointError(
            f"--load {config.load}: no complete checkpoint (step-NNNNNNNN) there; give the --save "
            "folder of a run, or leave --load out to start anew"
        )
    return None


def _newest_whole(
    checkpoints: list[Path], config: CheckpointConfig, groups: ProcessGroups, may_put_aside: bool
) -> Path:
    """Return the first of some checkpoints that is whole; the same on every rank.

    Raises:
        DamagedCheckpointError: none of them is.
        CheckpointError: one is of another version's format.
    """
    damaged: list[str] = []
    certain: list[Path] = []
    for checkpoint in checkpoints:
        told = groups.gather_texts(json.dumps([asdict(damage) for damage in _damages(checkpoint, config, groups)]))
        damages = [Damage(**damage) for text in told for damage in json.loads(text)]
        if not damages:
            if groups.rank == 0 and may_put_aside:
                # Not before one is found that is whole: the next start would else find an empty folder, and begin anew.
                for other in certain:
                    _put_aside(other)
            return checkpoint
        if any(damage.is_certain for damage in damages):
            certain.append(checkpoint)
        damaged.append(f"{checkpoint} is damaged: {'; '.join(sorted({damage.text for damage in damages}))}")
        if groups.rank == 0:
            logger.error("%s; the one before is tried", damaged[-1])
    listed = "\n  ".join(damaged)
    raise DamagedCheckpointError(
        f"no checkpoint is whole:\n  {listed}\nthe run does not begin anew by itself: copy one of them back, or start "
        "in another folder"
    )


def _damages(checkpoint: Path, config: CheckpointConfig, groups: ProcessGroups) -> list[Damage]:
    """Return what this rank finds wrong with its share of a checkpoint's files."""
    try:
        files = sorted(read_manifest(checkpoint).files.items())
    except DamagedCheckpointError as error:
        return [Damage(str(error), is_certain=not isinstance(error, UnreadableCheckpointError))]
    share = files[groups.rank :: groups.world_size] if config.verify_checkpoint else []
    found = (damage_of(checkpoint, name, entry) for name, entry in share)
    return [damage for damage in found if damage is not None]


def _put_aside(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f"{DAMAGED_PREFIX}{checkpoint.name}")
    number = 0
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{DAMAGED_PREFIX}{checkpoint.name}-{number}")
    try:
        checkpoint.rename(aside)
        logger.error("it is kept as %s", aside)
    except OSError as error:
        logger.error("it cannot be put aside (%s): its step will not be saved again", error)


def resume(config: RunConfig, plan: Plan, trainable: native.Trainable, checkpoint: Path | None) -> Progress:
    """Load the checkpoint to continue from; None = the run begins. Returns how far the run has come.

    Raises:
        CheckpointError: it was trained on other data or in another order.
    """
    if checkpoint is None:
        return Progress(data=plan.description)
    # ``checkpoint_to_resume`` has compared the files with the manifest, or was told not to.
    loaded = native.load(checkpoint, trainable, verify=False)
    progress = _on_this_data(config, plan, checkpoint, loaded)
    if trainable.engine.groups.rank == 0:
        ignored = f"; --init-weights {config.checkpoint.init_weights} is for new runs and was not read"
        logger.info("continuing from %s%s", checkpoint, ignored if config.checkpoint.init_weights else "")
        if changes := changed_settings(read_config(checkpoint), config):
            logger.info("settings that have changed since:\n  %s", "\n  ".join(changes))
    return progress


def _on_this_data(config: RunConfig, plan: Plan, checkpoint: Path, progress: Progress) -> Progress:
    """Return where a loaded run stands in the plan.

    Raises:
        CheckpointError: it was trained on other data, and ``checkpoint.allow_data_change`` is off.
    """
    if progress.data == plan.description:
        return progress
    names = [*progress.data, *(name for name in plan.description if name not in progress.data)]
    changes = [
        f"{name}: {progress.data.get(name, 'absent')} in the checkpoint, {plan.description.get(name, 'absent')} here"
        for name in names
        if progress.data.get(name) != plan.description.get(name)
    ]
    listed = "\n  ".join(changes)
    if not config.checkpoint.allow_data_change:
        raise CheckpointError(
            f"{checkpoint} was trained on other data:\n  {listed}\ncontinuing would repeat and skip documents. Use the "
            "settings of its run.toml, start in another folder, or --allow-data-change to begin with the new data's "
            "first row"
        )
    logger.warning("continuing %s with the first row of other data:\n  %s", checkpoint, listed)
    return dataclasses.replace(progress, consumed_rows=0, data=plan.description)


def changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the settings of a run that goes on which are others than those of its checkpoint, for the log.

    Where a run saves and what it says (sections ``checkpoint`` and ``logging``) changes nothing in it.
    """
    return [
        f"{section}.{field.name}: {old!r} in the checkpoint, {new!r} now"
        for section in section_types()
        if section not in ("checkpoint", "logging")
        for field in dataclasses.fields(getattr(now, section))
        if (old := getattr(getattr(before, section), field.name)) != (new := getattr(getattr(now, section), field.name))
    ]
