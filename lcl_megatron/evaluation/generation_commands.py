"""Subcommands of tools/evaluate.py for tasks that generate text: captioning and dialogue."""

from __future__ import annotations

from pathlib import Path

from lcl_megatron.config.errors import require
from lcl_megatron.evaluation.captioning import task as captions
from lcl_megatron.evaluation.dialogue import task as dialogues
from lcl_megatron.evaluation.dialogue.benchmark_list import open_benchmarks
from lcl_megatron.evaluation.flags import Flags
from lcl_megatron.evaluation.transfer.caption_sets import open_captioned
from lcl_megatron.evaluation.transfer.session import open_session
from lcl_megatron.evaluation.transfer.settings import read_settings


def captioning(
    flags: Flags,
    language_model: str,
    train: tuple[Path, ...],
    test: tuple[Path, ...],
    test_images: tuple[Path, ...],
    train_images: Path | None = None,
    train_split: str = "",
    test_split: str = "test",
) -> None:
    """Train connector and language model to write captions, score BLEU and CIDEr; --mode full trains the encoder too.

    Args:
        flags: Flags of all transfer tasks.
        language_model: Folder or name of a causal language model of transformers; random:FOLDER is untrained.
        train: Caption files (.json, .tsv), tars of pairs or folders of tars.
        test: Annotation files (COCO, dataset_coco.json, lists, NoCaps), each with a table of its own.
        test_images: Folder of the images of each test set, or one for all.
        train_images: Folder or tars of the images that training files name.
        train_split: Split of training files that have splits (dataset_coco.json); empty is all.
        test_split: Split of test files that have splits.
    """
    settings = read_settings(captions.CaptioningSettings, "captioning", flags.preset, flags.set)
    tests = _caption_tests(test, test_images, test_split)
    pairs = open_captioned(train, train_images, train_split)
    with open_session(flags.output, flags.cache) as session:
        for spec in flags.encoder:
            for result in captions.caption(
                spec, language_model, pairs, tests, settings, flags.mode, flags.seeds, session
            ):
                session.add(result)


def captioning_score(
    model: tuple[Path, ...],
    test: tuple[Path, ...],
    test_images: tuple[Path, ...],
    output: Path,
    test_split: str = "test",
    preset: str = "paper",
    set: tuple[str, ...] = (),
) -> None:
    """Score trained models again, on the same or other test sets.

    Args:
        model: Folders OUTPUT/models/NAME of earlier calls.
        test: Annotation files, each with a table of its own.
        test_images: Folder of the images of each test set, or one for all.
        output: Folder for results.json, results.md and results.png.
        test_split: Split of test files that have splits.
        preset: Name of a shipped preset, or a .toml file; what concerns generation is used.
        set: Single settings on top of the preset, e.g. num_beams=1.
    """
    settings = read_settings(captions.CaptioningSettings, "captioning", preset, set)
    tests = _caption_tests(test, test_images, test_split)
    with open_session(output, None) as session:
        for folder in model:
            for result in captions.score_model(folder, tests, settings, session):
                session.add(result)


def dialogue(
    flags: Flags,
    language_model: str,
    tuning: Path,
    tuning_images: Path,
    benchmarks: Path,
    alignment: Path | None = None,
    alignment_images: Path | None = None,
    aligned: Path | None = None,
) -> None:
    """Align a connector, tune on conversations, answer benchmarks (LLaVA-1.5); --mode full tunes the encoder too.

    Args:
        flags: Flags of all transfer tasks.
        language_model: Folder or name of a causal language model of transformers; random:FOLDER is untrained.
        tuning: Conversations of stage 2, e.g. llava_v1_5_mix665k.json.
        tuning_images: Folder of their images.
        benchmarks: TOML file with a table for each benchmark, see docs/evaluation_generation.md.
        alignment: Pairs of stage 1, e.g. blip_laion_cc_sbu_558k.json.
        alignment_images: Folder of their images.
        aligned: Instead of stage 1: a model that it saved, OUTPUT/models/alignment-NAME.
    """
    settings = read_settings(dialogues.DialogueSettings, "dialogue", flags.preset, flags.set)
    require(
        (alignment is None) != (aligned is None),
        "give either --alignment FILE, to do stage 1, or --aligned MODEL, to go on from it",
    )
    require(aligned is None or len(flags.encoder) == 1, "--aligned goes on with one --encoder, that of stage 1")
    pairs = None
    if alignment is not None:
        require(alignment_images is not None, "--alignment names images; give their folder: --alignment-images")
        assert alignment_images is not None
        pairs = dialogues.open_conversations(alignment, alignment_images, "plain")
    data = dialogues.DialogueData(
        pairs, dialogues.open_conversations(tuning, tuning_images, "vicuna_v1"), open_benchmarks(benchmarks)
    )
    with open_session(flags.output, flags.cache) as session:
        for spec in flags.encoder:
            for result in dialogues.converse(
                spec, language_model, data, settings, flags.mode, flags.seeds, session, aligned
            ):
                session.add(result)


def dialogue_score(
    model: tuple[Path, ...],
    benchmarks: Path,
    output: Path,
    preset: str = "paper",
    set: tuple[str, ...] = (),
) -> None:
    """Put benchmarks to trained models again.

    Args:
        model: Folders OUTPUT/models/NAME of earlier calls.
        benchmarks: TOML file with a table for each benchmark, see docs/evaluation_generation.md.
        output: Folder for results.json, results.md and results.png, and for the answer files.
        preset: Name of a shipped preset, or a .toml file; what concerns generation is used.
        set: Single settings on top of the preset, e.g. num_beams=3.
    """
    settings = read_settings(dialogues.DialogueSettings, "dialogue", preset, set)
    runs = open_benchmarks(benchmarks)
    with open_session(output, None) as session:
        for folder in model:
            for result in dialogues.score_model(folder, runs, settings, session):
                session.add(result)


def _caption_tests(test: tuple[Path, ...], test_images: tuple[Path, ...], split: str) -> list[captions.CaptionTest]:
    """Return test sets, whose results are told apart by the names of their files."""
    require(len(test) > 0, "--test is empty; give at least one annotation file")
    require(
        len(test_images) in (1, len(test)),
        f"--test-images has {len(test_images)} folders for {len(test)} test sets; give one for each, or one for all",
    )
    require(
        len({path.stem for path in test}) == len(test),
        f"--test {' '.join(map(str, test))}: files of the same name cannot be told apart; rename one",
    )
    roots = test_images if len(test_images) == len(test) else test_images * len(test)
    return [captions.open_caption_test(path, root, split) for path, root in zip(test, roots, strict=True)]
