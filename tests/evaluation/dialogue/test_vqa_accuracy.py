"""Oracles: the definition by brute force over the ten subsets of nine; ``vqaEval.py`` of the VQA challenge, whose two
clean-up steps are written out here as its source states them; answers whose official form is known.
"""

from __future__ import annotations

import json
import random
import re
from itertools import combinations
from pathlib import Path

import pytest

from lcl_megatron.evaluation.dialogue.vqa_accuracy import clean_answer, vizwiz_accuracy, vqa_accuracy

MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
DIGITS = dict(
    none="0", zero="0", one="1", two="2", three="3", four="4", five="5", six="6", seven="7", eight="8", nine="9",
    ten="10",
)  # fmt: skip
WORDS = "a an the dog Dogs none ten 1,000 3.5 u.s. yes. , . ? - (z) x/y dont couldnt've somebody'd hed 'twas".split()


def official_clean_up(text: str) -> str:
    """processPunctuation, then processDigitArticle; of the table of contractions only what ``WORDS`` can hold."""
    out = text
    for mark in MARKS:
        if mark + " " in text or " " + mark in text or re.search(r"(\d)(\,)(\d)", text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    out = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, count=int(re.UNICODE))
    contractions = {"dont": "don't", "couldnt've": "couldn't've", "somebody'd": "somebodyd", "hed": "he'd"}
    kept = [DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(contractions.get(word, word) for word in kept if word not in ("a", "an", "the"))


def official_accuracy(prediction: str, answers: list[str]) -> float:
    """Mean over the subsets of nine of min(matches / 3, 1)."""
    if len(set(answers)) > 1:
        prediction, answers = official_clean_up(prediction), [official_clean_up(answer) for answer in answers]
    subsets = list(combinations(answers, len(answers) - 1))
    return sum(min(1, subset.count(prediction) / 3) for subset in subsets) / len(subsets)


def random_text(draw: random.Random) -> str:
    return draw.choice(["", " ", ", "]).join(draw.choices(WORDS, k=draw.randint(1, 4)))


def test_clean_up_equals_the_official_rules() -> None:
    draw = random.Random(0)
    for text in [*(random_text(draw) for _ in range(5000)), "." * 40, "...1", "a-b -c"]:
        assert clean_answer(text) == official_clean_up(text), text


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("u.s.", "us"),
        ("3.5 m", "3.5 m"),
        ("1,000", "1000"),
        ("x-ray", "x ray"),
        ("red, blue", "red blue"),
        ("it isnt", "it isn't"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("an", ""),
    ],
)
def test_clean_answer(answer: str, cleaned: str) -> None:
    assert clean_answer(answer) == cleaned


def test_accuracy_equals_the_mean_over_subsets() -> None:
    draw = random.Random(1)
    seen = set()
    for _ in range(3000):
        pool = [random_text(draw) for _ in range(draw.randint(1, 4))]
        answers, prediction = draw.choices(pool, k=10), draw.choice(pool)
        accuracy = vqa_accuracy(prediction, answers)
        assert accuracy == pytest.approx(official_accuracy(prediction, [text.strip() for text in answers]), abs=1e-9)
        seen.add(round(accuracy, 3))
    assert {0.3, 0.6, 0.9, 1.0} <= seen


def test_spelling_counts_where_all_ten_agree() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0
    assert vqa_accuracy(" yes\n", ["yes"] * 10) == 1.0


def test_vizwiz_cleans_only_the_prediction() -> None:
    assert vizwiz_accuracy("The dog", ["dog"] * 10) == 1.0
    assert vizwiz_accuracy("the dog", ["the dog"] * 5 + ["cat"] * 5) == 0.0
    answers = ["dog"] * 3 + ["cat"] * 7
    subsets = combinations(answers, 9)
    assert vizwiz_accuracy("dog", answers) == pytest.approx(sum(min(1, s.count("dog") / 3) for s in subsets) / 10)


def test_question_without_answers_is_an_error() -> None:
    with pytest.raises(ValueError, match="without reference answers cannot be scored; give the annotations"):
        vqa_accuracy("dog", [])


@pytest.mark.parametrize("name", ["textvqa", "vizwiz"])
def test_published_annotations(shared_data: Path, name: str) -> None:
    path = shared_data / "upstream_samples" / "vqa" / f"{name}_val_annotations_first20.json"
    for entry in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
        answers = [answer["answer"] for answer in entry["answers"]]
        for prediction in {*answers, "The " + answers[0] + "."}:
            accuracy = vqa_accuracy(prediction, answers)
            assert accuracy == pytest.approx(official_accuracy(prediction, answers), abs=1e-9)
