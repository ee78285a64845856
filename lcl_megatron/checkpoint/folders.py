"""Folders of checkpoints: their names and the small files in them; needs neither megatron-core nor a launcher."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lcl_megatron.checkpoint.manifest import STEP_FOLDER, CheckpointError, DamagedCheckpointError
from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import from_toml

CONFIG_FILE = "run.toml"
TOKENIZER_FILE = "tokenizer.model"


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


def step_folder(root: str | Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return Path(root) / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step that the name of a checkpoint's folder says: the inverse of ``step_folder``.

    Raises:
        CheckpointError: the folder has another name.
    """
    named = STEP_FOLDER.fullmatch(checkpoint.name)
    if named is None:
        raise CheckpointError(f"{checkpoint} is not called step-NNNNNNNN; give it the name that its run gave it")
    return int(named[1])


def complete_checkpoints(root: str | Path) -> list[Path]:
    """Return the checkpoints under ``root`` by their names, newest first, or ``root`` itself if it is one.

    Names tell that a checkpoint was completed, and not that its files are still as they were: see ``manifest.verify``.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    if is_checkpoint(root):
        return [root]
    complete = [folder for folder in root.iterdir() if STEP_FOLDER.fullmatch(folder.name) and folder.is_dir()]
    return sorted(complete, key=step_of, reverse=True)


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder, there or not, is taken for a checkpoint itself and not for one that holds some."""
    # By its name too: a checkpoint whose file is missing is a damaged one, and not none.
    return (folder / CONFIG_FILE).is_file() or STEP_FOLDER.fullmatch(folder.resolve().name) is not None


def read_config(checkpoint: Path) -> RunConfig:
    """Return the configuration of the run that wrote a checkpoint.

    Raises:
        CheckpointError: the folder is no checkpoint.
        ConfigError: the file holds another configuration than any of this version.
    """
    path = checkpoint / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {CONFIG_FILE}; expected a step-NNNNNNNN folder of a training run; a folder of a "
            "stock library, such as an export, becomes a start for runs by "
            "tools/convert_checkpoint.py import FOLDER WEIGHTS"
        )
    try:
        return from_toml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise DamagedCheckpointError(f"{path} is no text: {error}") from error
