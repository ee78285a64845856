"""The subcommands of tools/evaluate.py: from what the user chose to results in a folder.

A function's parameters are its flags, and its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lcl_megatron.config.errors import require
from lcl_megatron.evaluation.flags import Flags
from lcl_megatron.evaluation.transfer.caption_sets import open_captioned
from lcl_megatron.evaluation.transfer.classification import ClassificationSettings, classify
from lcl_megatron.evaluation.transfer.labelled_sets import open_labelled
from lcl_megatron.evaluation.transfer.report import markdown_table, merge_results, write_results
from lcl_megatron.evaluation.transfer.retrieval import RetrievalSettings, retrieve
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


def retrieval(
    flags: Flags,
    train: tuple[Path, ...],
    test: tuple[Path, ...],
    train_images: Path | None = None,
    test_images: tuple[Path, ...] = (),
    train_split: str = "",
    test_split: str = "test",
) -> None:
    """Train a fresh text encoder and a pool by contrast and score retrieval both ways; --mode full trains the encoder.

    Args:
        flags: Flags of all transfer tasks.
        train: Caption files (.json, .tsv), tars of pairs or folders of tars.
        test: Test sets, each with a table of its own; files of the same forms.
        train_images: Folder or tars of the images that training files name.
        test_images: The same for each test set, or one for all.
        train_split: Split of training files that have splits (dataset_coco.json); empty is all.
        test_split: Split of test files that have splits; empty is all.
    """
    settings = read_settings(RetrievalSettings, "retrieval", flags.preset, flags.set)
    roots = test_images * len(test) if len(test_images) == 1 else test_images or (None,) * len(test)
    require(
        len(roots) == len(test),
        f"--test-images names {len(test_images)} folders for {len(test)} test sets; give one for all, or one for each",
    )
    pairs = open_captioned(train, train_images, train_split)
    tests = [open_captioned([file], root, test_split, is_test=True) for file, root in zip(test, roots, strict=True)]
    with open_session(flags.output, flags.cache) as session:
        session.say(f"training: {len(pairs):,} images of {pairs.source}; left out: {pairs.left_out or 'none'}")
        for spec in flags.encoder:
            for result in retrieve(spec, pairs, tests, settings, flags.mode, flags.seeds, session):
                session.add(result)


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


COMMANDS: dict[str, Callable[..., None]] = {"classification": classification, "retrieval": retrieval, "table": table}
"""Subcommands by name."""
