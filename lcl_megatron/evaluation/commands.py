"""The subcommands of tools/evaluate.py: from what the user chose to results in a folder.

A function's parameters are its flags, and its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from lcl_megatron.config.errors import require
from lcl_megatron.evaluation.transfer.classification import ClassificationSettings, classify
from lcl_megatron.evaluation.transfer.labelled_sets import open_labelled
from lcl_megatron.evaluation.transfer.report import markdown_table, merge_results, write_results
from lcl_megatron.evaluation.transfer.session import Mode, open_session
from lcl_megatron.evaluation.transfer.settings import read_settings


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


Flags = Annotated[TransferFlags, tyro.conf.arg(name="")]
"""Flags without a prefix."""


def classification(flags: Flags, data: Path, splits: tuple[str, str] = ("train", "val")) -> None:
    """Fit a classifier (attention pool, norm, linear) on an encoder and score it; --mode full trains the encoder too.

    Args:
        flags: Flags of all transfer tasks.
        data: Folder: SPLIT/CLASS/*.jpg, SPLIT*.tar with .jpg and .cls, or labels.csv and images.
        splits: Training and test split.
    """
    settings = read_settings(ClassificationSettings, "classification", flags.preset, flags.set)
    train, test = open_labelled(data, *splits)
    with open_session(flags.output, flags.cache) as session:
        session.say(f"{train.source}: {len(train.images):,} images, {test.source}: {len(test.images):,} images")
        for spec in flags.encoder:
            session.add(classify(spec, train, test, settings, flags.mode, flags.seeds, session))


def table(results: list[Path], output: Path | None = None) -> None:
    """Put results of several calls into one table per task and test set.

    Args:
        results: Folders or results.json files.
        output: Folder for the merged results.json, results.md and results.png; without it the table is printed.
    """
    merged = merge_results(results)
    if output is None:
        print(markdown_table(merged))  # noqa: T201 - what the user asked for
    else:
        write_results(merged, output)


COMMANDS: dict[str, Callable[..., None]] = {"classification": classification, "table": table}
"""Subcommands by name."""
