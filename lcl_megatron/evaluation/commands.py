"""The subcommands of tools/evaluate.py: from what the user chose to results in a folder.

A function's parameters are its flags, and its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lcl_megatron.evaluation.flags import Flags
from lcl_megatron.evaluation.transfer.classification import ClassificationSettings, classify
from lcl_megatron.evaluation.transfer.labelled_sets import open_labelled
from lcl_megatron.evaluation.transfer.report import markdown_table, merge_results, write_results
from lcl_megatron.evaluation.transfer.session import open_session
from lcl_megatron.evaluation.transfer.settings import read_settings


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
