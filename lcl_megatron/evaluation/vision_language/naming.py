"""Names of trained models, which become names of folders and of states of training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def model_name(task: str, encoder: str, mode: str, seed: int) -> str:
    """Return ``captioning-ENCODER-frozen-seed0``, with nothing in it that a file name cannot hold."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{task}-{encoder[-100:]}-{mode}-seed{seed}")


def state_file(output: Path, name: str, encoder: dict[str, Any], trained_on: str) -> Path:
    """Return where the training of a model is saved until the call ends.

    Args:
        output: folder of the results.
        name: of the model.
        encoder: its description.
        trained_on: ``session.digest`` of the training data and of the settings that ``fit`` does not know of.
    """
    return output / "states" / f"{name}-{encoder.get('fingerprint', '')}-{trained_on}.pt"
