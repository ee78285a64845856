"""The subcommands of tools/evaluate.py: from what the user chose to results in a folder.

A function's parameters are its flags, and its docstring is its help.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lcl_megatron.config.errors import require
from lcl_megatron.evaluation.classification.task import ClassificationSettings, classify
from lcl_megatron.evaluation.flags import Flags
from lcl_megatron.evaluation.generation_commands import captioning, captioning_score, dialogue, dialogue_score
from lcl_megatron.evaluation.probe.task import probe
from lcl_megatron.evaluation.retrieval.task import RetrievalSettings, retrieve
from lcl_megatron.evaluation.transfer.caption_sets import open_captioned
from lcl_megatron.evaluation.transfer.labelled_sets import open_labelled, open_split
from lcl_megatron.evaluation.transfer.report import markdown_table, merge_results, write_results
from lcl_megatron.evaluation.transfer.session import open_session
from lcl_megatron.evaluation.transfer.settings import read_settings
from lcl_megatron.evaluation.zero_shot.task import TEMPLATES, read_class_names, zero_shot


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


def probe_command(
    encoder: tuple[str, ...], data: Path, output: Path, splits: tuple[str, str] = ("train", "val")
) -> None:
    """Score frozen encoders by k-NN and a linear probe on the mean of their patch features: cheap, nothing to choose.

    Args:
        encoder: Folders or names, see docs/evaluation.md; NAME=ENCODER names one.
        data: Folder of labelled images, as for classification.
        output: Folder for results.json, results.md and results.png.
        splits: Training and test split.
    """
    train, test = open_labelled(data, *splits)
    with open_session(output, None) as session:
        for spec in encoder:
            session.add(probe(spec, train, test, session))


def zero_shot_command(
    checkpoint: Path,
    data: Path,
    output: Path,
    split: str = "val",
    tokenizer: Path | None = None,
    class_names: Path | None = None,
    templates: tuple[str, ...] = TEMPLATES,
) -> None:
    """Classify images by the similarity of their pooled latent with the context feature at <BoI> after a prompt.

    Args:
        checkpoint: Folder of training checkpoints, or one checkpoint; one process, megatron-core is needed.
        data: Folder of labelled images, as for classification.
        output: Folder for results.json, results.md and results.png.
        split: Split to score.
        tokenizer: SentencePiece file; by default the run's.
        class_names: Text file with a name a line, in the order of the classes; by default the classes' own names.
        templates: Prompts; {} stands for the name.
    """
    # Imports megatron-core, which nothing else here needs.
    from lcl_megatron.evaluation.zero_shot.checkpoint_model import checkpoint_model

    test = open_split(data, split)
    names = test.classes if class_names is None else read_class_names(class_names, len(test.classes))
    with checkpoint_model(checkpoint, tokenizer) as model, open_session(output, None) as session:
        session.add(zero_shot(model, test, names, templates))


def table(results: list[Path], output: Path | None = None) -> None:
    """Put results of several calls into one table per task and test set.

    Args:
        results: Folders or results.json files.
        output: Folder for the merged results.json, results.md and results.png; without it the table is only printed.
    """
    merged = merge_results(results)
    print(markdown_table(merged))  # noqa: T201 - what the user asked for
    if output is not None:
        write_results(merged, output)
        print(f"wrote {output}/results.json, results.md and results.png")  # noqa: T201


COMMANDS: dict[str, Callable[..., None]] = {
    "classification": classification,
    "retrieval": retrieval,
    "probe": probe_command,
    "zero-shot": zero_shot_command,
    "captioning": captioning,
    "captioning-score": captioning_score,
    "dialogue": dialogue,
    "dialogue-score": dialogue_score,
    "table": table,
}
"""Subcommands by name."""
