"""Words for the digits. Oracles: the labels written by hand, and the readers of captions, conversations and POPE."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lcl_megatron.evaluation.captioning.annotations import read_caption_test_set
from lcl_megatron.evaluation.dialogue.benchmark_list import open_benchmarks
from lcl_megatron.evaluation.dialogue.conversations import read_conversations

TOOL = Path(__file__).parents[2] / "examples" / "digits" / "make_talk.py"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN, TEST = [7, 0, 7, 9], [3, 9]


def make(folder: Path, output: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--digits", "digits", "--output", output]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "digits" / "images").mkdir(parents=True)
    lines = ["image_name,split,label", "p.png,pretrain,1"]
    for split, labels in (("probe_train", TRAIN), ("test", TEST)):
        lines += [f"{split}{number}.png,{split},{label}" for number, label in enumerate(labels)]
    for line in lines[1:]:
        Image.new("RGB", (4, 4)).save(tmp_path / "digits" / "images" / line.split(",")[0])
    (tmp_path / "digits" / "labels.csv").write_text("\n".join(lines))
    return tmp_path


def test_tasks_read_what_is_written_and_every_answer_is_right(folder: Path) -> None:
    done = make(folder, "deep/talk")
    assert (done.returncode, done.stdout) == (0, "deep/talk: 4 captions to train on, 2 to test, 6 test questions\n")
    talk = folder / "deep" / "talk"
    for split, labels in (("probe_train", TRAIN), ("test", TEST)):
        found = read_caption_test_set(talk / f"captions_{split}.json")
        assert [(image.name, image.captions) for image in found] == [
            (f"{split}{number}.png", (f"a photo of a {WORDS[label]}",)) for number, label in enumerate(labels)
        ]
    assert [pair.turns[0].answer for pair in read_conversations(talk / "alignment.json")] == [
        f"a photo of a {WORDS[label]}" for label in TRAIN
    ]
    asked = [
        (conversation.images[0], conversation.turns[0].question, conversation.turns[0].answer)
        for conversation in read_conversations(talk / "tuning.json")
    ]
    which, run = open_benchmarks(talk / "benchmarks.toml")
    assert [(question.image, question.answers) for question in which.questions] == [
        (f"test{number}.png", (str(label),) * 10) for number, label in enumerate(TEST)
    ]
    open_questions, asked = asked[: len(TRAIN)], asked[len(TRAIN) :]
    # What the benchmark asks is what tuning taught, to the letter.
    assert {text for _, text, _ in open_questions} == {f"<image>\n{question.text}" for question in which.questions}
    assert [answer for _, _, answer in open_questions] == [WORDS[label] for label in TRAIN]
    assert which.benchmark.score(which.questions, [WORDS[label] for label in TEST])["accuracy"].value == 1.0
    tested = [(question.image, question.text, question.answers[0]) for question in run.questions]
    for split, labels, questions in (("probe_train", TRAIN, asked), ("test", TEST, tested)):
        assert len(questions) == 2 * len(labels)
        for number, (image, text, answer) in enumerate(questions):
            label = labels[number // 2]
            assert image == f"{split}{number // 2}.png"
            assert answer == ("yes" if f"Is this a {WORDS[label]}?" in text else "no")
            assert answer == ("yes", "no")[number % 2]
            assert text.endswith("\nAnswer the question using a single word or phrase.")
    images = run.images
    assert images.files is not None
    assert images.read(0) == (folder / "digits" / "images" / "test0.png").read_bytes()


def test_missing_digits_are_said_with_how_to_make_them(tmp_path: Path) -> None:
    done = make(tmp_path, "talk")
    assert done.returncode == 1
    assert "there is no file digits/labels.csv; make it: examples/digits/make_corpus.py --output FOLDER" in done.stderr
    assert not (tmp_path / "talk").exists()
