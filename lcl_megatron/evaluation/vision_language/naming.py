"""Names of trained models, which become names of folders."""

from __future__ import annotations

import re


def model_name(task: str, encoder: str, mode: str, seed: int) -> str:
    """Return ``captioning-ENCODER-frozen-seed0``, with nothing in it that a file name cannot hold."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{task}-{encoder[-100:]}-{mode}-seed{seed}")
