"""Flags that all transfer tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lcl_megatron.config.errors import require
from lcl_megatron.evaluation.encoders.load import encoder_name
from lcl_megatron.evaluation.transfer.session import Mode


@dataclass(frozen=True, kw_only=True)
class TransferFlags:
    """What all tasks that train something are asked; tyro makes the flags of the fields."""

    encoder: tuple[str, ...]
    """Folders or names, see docs/evaluation.md; NAME=ENCODER names one. Each gives a row of the table."""
    output: Path
    """Folder for results.json, results.md and results.png."""
    preset: str = "paper"
    """Name of a shipped preset (paper, cpu), or a .toml file."""
    set: tuple[str, ...] = ()
    """Single settings on top of the preset, e.g. fit.steps=100."""
    mode: Mode = "frozen"
    """Whether the encoder stays as it is or is trained along."""
    seeds: tuple[int, ...] = (0,)
    """One fit for each."""
    cache: Path | None = None
    """Folder for frozen features, which several calls may share; by default OUTPUT/features."""

    def __post_init__(self) -> None:
        for name, values in (("--encoder", self.encoder), ("--seeds", self.seeds)):
            require(len(values) > 0, f"{name} is empty; give at least one")
            require(len(frozenset(values)) == len(values), f"{name} {' '.join(map(str, values))}: one is there twice")
        names = [encoder_name(spec) for spec in self.encoder]
        require(
            len(frozenset(names)) == len(names),
            f"--encoder {' '.join(self.encoder)}: two are called alike, {max(names, key=names.count)}, so that files "
            "of one would be written over the other's; name them: NAME=ENCODER",
        )


Flags = Annotated[TransferFlags, tyro.conf.arg(name="")]
"""Flags without a prefix."""
