"""Oracles: the benchmark's score of the written answers; a model that can see only colours must learn to name them;
one process against two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library
from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.dialogue.benchmark import BenchmarkError
from lcl_megatron.evaluation.dialogue.benchmark_list import open_benchmarks
from lcl_megatron.evaluation.dialogue.conversations import ConversationError
from lcl_megatron.evaluation.dialogue.task import DialogueSettings, open_conversations, other_images
from lcl_megatron.evaluation.flags import TransferFlags
from lcl_megatron.evaluation.generation_commands import dialogue, dialogue_score
from lcl_megatron.evaluation.transfer.image_sets import DataError
from lcl_megatron.evaluation.transfer.results import read_json
from lcl_megatron.evaluation.transfer.settings import read_settings
from tests.distributed import run_distributed
from tests.evaluation.vision_language.small_data import (
    ENCODER,
    conversation_file,
    language_model_folder,
    write_images,
    write_json,
)

try:
    stock_library("transformers")
    stock_library("timm")
except LibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

QUICK = (
    "alignment.steps=10", "alignment.batch_size=8", "alignment.warmup_steps=2", "tuning.steps=150",
    "tuning.batch_size=16", "tuning.lr=0.01", "tuning.warmup_steps=10", "max_length=200", "other_images=true",
)  # fmt: skip


def question_file(path: Path, images: list[tuple[str, str]]) -> Path:
    entries = [
        {"question": "What colour is it?", "imageId": Path(name).stem, "answer": colour, "isBalanced": True}
        for name, colour in images
    ]
    return write_json(path, {str(number): entry for number, entry in enumerate(entries)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dialogue")
    language_model_folder(root / "lm")
    images = write_images(root / "images", 28)
    conversation_file(root / "pairs.json", images[:20])
    conversation_file(root / "chats.json", images[:20], turns=2)
    for name, _ in images[20:]:
        (root / "images" / name).rename(root / "images" / f"{Path(name).stem}.jpg")
    question_file(root / "questions.json", images[20:])
    (root / "benchmarks.toml").write_text('[gqa]\nquestions = "questions.json"\nimages = "images"\n')
    return root


def flags(output: Path, settings: tuple[str, ...] = QUICK, **others: Any) -> TransferFlags:
    return TransferFlags(encoder=(ENCODER,), output=output, preset="cpu", set=settings, **others)


def run(folder: Path, output: Path, settings: tuple[str, ...] = QUICK, **others: Any) -> None:
    stages = {"alignment": folder / "pairs.json", "alignment_images": folder / "images"} | others
    dialogue(
        flags(output, settings), str(folder / "lm"), folder / "chats.json", folder / "images",
        folder / "benchmarks.toml", **stages,
    )  # fmt: skip


def test_a_model_learns_to_name_what_it_sees(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out")
    (result,) = read_json(tmp_path / "out")
    metrics = {metric.name: metric for metric in result.metrics}
    answers = json.loads((tmp_path / "out" / "answers" / "dialogue-tiny-frozen-seed0" / "gqa" / "gqa.json").read_text())
    right = json.loads((folder / "questions.json").read_text())
    accuracy = np.mean([answer["prediction"] == right[answer["questionId"]]["answer"] for answer in answers])
    assert metrics["accuracy"].mean == accuracy
    assert accuracy >= 0.75
    # With the image of another question it can be right only where both are of one colour.
    assert metrics["accuracy, other images"].mean < accuracy
    assert set(result.curves) == {"0", "0 alignment"}
    assert result.data["tuning"] == {"conversations": 21, "turns": 41, "images": 20, "without_image": 1}

    model = tmp_path / "out" / "models" / "dialogue-tiny-frozen-seed0"
    dialogue_score((model,), folder / "benchmarks.toml", tmp_path / "again", preset="cpu", set=QUICK)
    (again,) = read_json(tmp_path / "again")
    assert [metric.mean for metric in again.metrics] == [metric.mean for metric in result.metrics]


def test_stage_2_goes_on_from_a_saved_stage_1_and_two_ranks_answer_alike(folder: Path, tmp_path: Path) -> None:
    few = (*QUICK, "tuning.steps=3", "tuning.warmup_steps=1", "alignment.steps=3", "other_images=false")
    run(folder, tmp_path / "whole", few)
    aligned = tmp_path / "whole" / "models" / "alignment-tiny-frozen-seed0"
    run(folder, tmp_path / "second", few, alignment=None, alignment_images=None, aligned=aligned)
    run_distributed(lambda *_rank: run(folder, tmp_path / "ranks", few), 2)
    answers = [
        (tmp_path / name / "answers" / "dialogue-tiny-frozen-seed0" / "gqa" / "gqa.json").read_text()
        for name in ("whole", "second", "ranks")
    ]
    assert answers[0] == answers[1] == answers[2]
    (whole,), (second,), (ranks,) = (read_json(tmp_path / name) for name in ("whole", "second", "ranks"))
    assert second.curves["0"].losses == whole.curves["0"].losses
    assert ranks.curves["0"].losses == pytest.approx(whole.curves["0"].losses, rel=1e-5)
    with pytest.raises(ConfigError, match="was aligned with encoder .* and language model .*; give the same ones"):
        dialogue(
            flags(tmp_path / "x"), "other", folder / "chats.json", folder / "images", folder / "benchmarks.toml",
            aligned=aligned,
        )  # fmt: skip


def test_states_of_a_call_that_failed_are_not_taken_up_with_another_stage_1(folder: Path, tmp_path: Path) -> None:
    few = (*QUICK, "tuning.steps=3", "tuning.warmup_steps=1", "alignment.steps=3", "other_images=false")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers").write_text("in the way")
    with pytest.raises(OSError, match="answers"):
        run(folder, tmp_path / "out", few)
    (tmp_path / "out" / "answers").unlink()
    pairs = json.loads((folder / "pairs.json").read_text())
    captions = [pair["conversations"][1]["value"] for pair in pairs]
    for pair, caption in zip(pairs, captions[1:] + captions[:1], strict=True):
        pair["conversations"][1]["value"] = caption
    for name in ("out", "fresh"):
        run(folder, tmp_path / name, few, alignment=write_json(tmp_path / "pairs.json", pairs))
    found, fresh = (read_json(tmp_path / name)[0].curves for name in ("out", "fresh"))
    assert found == fresh


def test_paper_preset_is_table_8() -> None:
    settings = read_settings(DialogueSettings, "dialogue", "paper")
    stages = [
        (stage.steps, stage.batch_size, stage.lr, stage.warmup_steps, stage.weight_decay)
        for stage in (settings.alignment, settings.tuning)
    ]
    assert stages == [(1091, 512, 1e-3, 30, 1e-4), (5198, 128, 2e-5, 156, 1e-4)]


def test_images_are_exchanged_among_questions_that_have_one(folder: Path) -> None:
    (benchmark,) = open_benchmarks(folder / "benchmarks.toml")
    exchanged = other_images(benchmark)
    assert sorted(exchanged) == list(range(8))
    assert (exchanged != np.arange(8)).all()


def test_flags_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give either --alignment FILE, to do stage 1, or --aligned MODEL"):
        run(folder, tmp_path, alignment=None)
    with pytest.raises(ConfigError, match="give either --alignment"):
        run(folder, tmp_path, aligned=tmp_path)
    with pytest.raises(ConfigError, match="--alignment names images; give their folder: --alignment-images"):
        run(folder, tmp_path, alignment_images=None)
    two = TransferFlags(encoder=("a", "b"), output=tmp_path, preset="cpu")
    with pytest.raises(ConfigError, match="--aligned goes on with one --encoder, that of stage 1"):
        dialogue(two, "lm", tmp_path, tmp_path, tmp_path, aligned=tmp_path)


def test_conversations_are_checked_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match="template plain takes one image and one turn"):
        open_conversations(folder / "chats.json", folder / "images", "plain")
    with pytest.raises(DataError, match="20 of 20 images are not in .*, the first is 0000.png"):
        open_conversations(folder / "pairs.json", tmp_path, "plain")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x", "is not valid TOML"),
        ("", "names no benchmark; write a table such as"),
        ("gqa = 3", r"gqa is no table; write \[gqa\] with questions"),
        ("[gqa]\nquestion = 'x'", r"\[gqa\] has question; known: form, questions, annotations, images, split"),
        ("[gqa]\nquestions = 3", r"\[gqa\] has values that are no texts"),
        ("[gqa]\nimages = 'x'", r"\[gqa\] has no questions; give the question file"),
        ("[other]\nquestions = 'questions.json'", "there is no benchmark 'other'; known: vqav2"),
        ("[gqa]\nquestions = 'questions.json'", r"\[gqa\] has no images; give the folder"),
        ("[gqa]\nquestions = 'none.json'\nimages = 'images'", "there is no file .*none.json"),
        ("[x]\nform = 'gqa'\nquestions = 'empty.json'\nimages = 'images'", "empty.json has no question"),
    ],
)
def test_damaged_lists_of_benchmarks(folder: Path, content: str, message: str) -> None:
    write_json(folder / "empty.json", {})
    (folder / "other.toml").write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        open_benchmarks(folder / "other.toml")


def test_missing_list_and_missing_images(folder: Path) -> None:
    with pytest.raises(BenchmarkError, match="there is no file .*absent.toml; write a table for every benchmark"):
        open_benchmarks(folder / "absent.toml")
    (folder / "lm" / "list.toml").write_text('[gqa]\nquestions = "../questions.json"\nimages = "."\n')
    with pytest.raises(DataError, match="8 of 8 images are not in"):
        open_benchmarks(folder / "lm" / "list.toml")


def test_images_inside_the_question_file(folder: Path) -> None:
    table = "index\tquestion\timage\tA\tB\tanswer\n1\tWhat?\tSlBFRw==\ta\tb\tA\n"
    (folder / "mmbench.tsv").write_text(table)
    (folder / "mmbench.toml").write_text('[mmbench]\nquestions = "mmbench.tsv"\n')
    (benchmark,) = open_benchmarks(folder / "mmbench.toml")
    assert benchmark.images.read(0) == b"JPEG"
    assert benchmark.images.name(0) == "image of question 1"
