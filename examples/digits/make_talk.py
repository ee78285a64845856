"""Put the labelled digits of make_corpus.py into words: captions, and questions with answers.

python examples/digits/make_talk.py --digits digits --output talk

    talk/captions_SPLIT.json    [{"image", "image_id", "caption"}]: "a photo of a seven"
    talk/alignment.json         the training split's captions as conversations, for LLaVA's first stage
    talk/tuning.json            the training split's questions with answers, for its second stage
    talk/which_digit.json       the test split's question "Which digit is this?", in VizWiz's form, ten people agreeing
    talk/pope/                  the test split's questions with yes and no, in POPE's form
    talk/benchmarks.toml        names them for --benchmarks

Every picture is asked which digit it is, and twice with yes and no, after its own digit and after another one: half
of these answers are "yes". The same arguments give the same files.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path

import tyro
from sentences import WORDS

TRAIN, TEST = "probe_train", "test"
"""Splits of ``labels.csv`` whose images are in no document."""
INSTRUCTION = "Answer the question using a single word or phrase."
"""What every question of a benchmark ends with."""
WHICH = "Which digit is this?"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
"""What a question of VizWiz has before the instruction."""
PEOPLE = 10
"""How many people answer a question of VizWiz."""


@dataclass(frozen=True, kw_only=True)
class TalkConfig:
    """What is read, and where to write."""

    digits: Path
    """Folder that make_corpus.py wrote."""
    output: Path
    """Folder to write."""


def read_split(labels: Path, split: str) -> list[tuple[str, str]]:
    """Return image and digit, as a word, of every image of a split."""
    with open(labels, newline="", encoding="utf-8") as file:
        return [(row["image_name"], WORDS[int(row["label"])]) for row in csv.DictReader(file) if row["split"] == split]


def ask_yes_or_no(images: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Return image, question and answer, two for each image."""
    asked = []
    for number, (image, word) in enumerate(images):
        other = WORDS[(WORDS.index(word) + 1 + number % 9) % 10]
        asked += [(image, f"Is this a {word}?", "yes"), (image, f"Is this a {other}?", "no")]
    return asked


def conversation(image: str, question: str, answer: str) -> dict[str, object]:
    """Return a conversation of one turn in LLaVA's form."""
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


def main() -> None:
    """Read the flags and write everything."""
    config = tyro.cli(TalkConfig, description=__doc__)
    labels = config.digits / "labels.csv"
    if not labels.is_file():
        raise SystemExit(f"error: there is no file {labels}; make it: examples/digits/make_corpus.py --output FOLDER")
    train, test = read_split(labels, TRAIN), read_split(labels, TEST)
    pope = [
        json.dumps({"question_id": number, "image": image, "text": text, "label": answer})
        for number, (image, text, answer) in enumerate(ask_yes_or_no(test))
    ]
    # Scoring turns a number word that a model answers into a digit, and leaves people's answers as they are.
    which = [
        {"image": image, "question": WHICH, "answers": [{"answer": str(WORDS.index(word))}] * PEOPLE}
        for image, word in test
    ]
    tuning = [(image, f"{WHICH}\n{UNANSWERABLE}", word) for image, word in train] + ask_yes_or_no(train)
    # Relative to the file itself, as every path of a benchmarks file.
    images = os.path.relpath(config.digits / "images", config.output)
    (config.output / "pope").mkdir(parents=True, exist_ok=True)
    for name, records in (
        ("alignment.json", [conversation(image, "What is it?", f"a photo of a {word}") for image, word in train]),
        ("tuning.json", [conversation(image, f"{text}\n{INSTRUCTION}", answer) for image, text, answer in tuning]),
        ("which_digit.json", which),
        *(
            (
                f"captions_{split}.json",
                [
                    {"image": image, "image_id": number, "caption": [f"a photo of a {word}"]}
                    for number, (image, word) in enumerate(named)
                ],
            )
            for split, named in ((TRAIN, train), (TEST, test))
        ),
    ):
        (config.output / name).write_text(json.dumps(records), encoding="utf-8")
    (config.output / "pope" / "coco_pope_random.json").write_text("\n".join(pope) + "\n", encoding="utf-8")
    (config.output / "benchmarks.toml").write_text(
        f'[which_digit]\nform = "vizwiz"\nquestions = "which_digit.json"\nimages = {json.dumps(images)}\n\n'
        f'[pope]\nquestions = "pope"\nimages = {json.dumps(images)}\n',
        encoding="utf-8",
    )
    asked = len(which) + len(pope)
    print(f"{config.output}: {len(train):,} captions to train on, {len(test):,} to test, {asked:,} test questions")


if __name__ == "__main__":
    main()
