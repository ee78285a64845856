"""What is on disk: which checkpoints a folder holds, whether they are whole, and what tensors they hold."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lcl_megatron.checkpoint import manifest
from lcl_megatron.checkpoint.folders import complete_checkpoints, step_folder, step_of


def newest_step(root: Path) -> int:
    """Return the step of the newest checkpoint whose name is complete; 0 = none."""
    found = complete_checkpoints(root)
    return step_of(found[0]) if found else 0


def damaged_checkpoints(root: Path) -> list[str]:
    """Return what is wrong with checkpoints that have a final name."""
    problems = []
    for folder in sorted(root.glob("step-*")):
        try:
            manifest.verify(folder)
        except manifest.DamagedCheckpointError as error:
            # A run that goes on deletes old ones, by another name first: what is gone meanwhile was not torn.
            if folder.exists():
                problems.append(str(error))
    return problems


def tensor_digests(root: Path, step: int) -> dict[str, str]:
    """Return the SHA-256 of every file of tensors of a checkpoint.

    Args:
        root: the folder of checkpoints.
        step: whose.
    """
    folder = step_folder(root, step)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}
