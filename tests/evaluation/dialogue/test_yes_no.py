"""Oracles: ``eval_pope.py`` of LLaVA and MME's ``calculation.py``, their definitions written out question by question;
scikit-learn for precision, recall and F1 where it is installed.
"""

from __future__ import annotations

import random

import pytest

from lcl_megatron.evaluation.dialogue.yes_no import (
    YesNoCounts,
    mme_answer,
    mme_task_score,
    pope_answer,
    pope_counts,
)

TEXTS = [
    "Yes",
    "yes.",
    "No",
    "no, there is not",
    "There is not.",
    "Yes. No",
    "Nope",
    "",
    "unknown",
    "Know",
    "NO",
    "no\n",
]


def test_pope_answer_reads_the_first_sentence_only() -> None:
    said_no = [text for text in TEXTS if pope_answer(text) == "no"]
    assert said_no == ["No", "no, there is not", "There is not."]


def test_pope_counts_equal_the_definition() -> None:
    draw = random.Random(0)
    texts, labels = draw.choices(TEXTS, k=400), draw.choices(["yes", "no"], k=400)
    counts = pope_counts(texts, labels)  # type: ignore[arg-type]
    said = ["no" if {"No", "not", "no"} & set(t.split(".")[0].replace(",", "").split(" ")) else "yes" for t in texts]
    tp = sum(s == la == "yes" for s, la in zip(said, labels, strict=True))
    fp = said.count("yes") - tp
    fn = labels.count("yes") - tp
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    assert counts.precision == pytest.approx(precision, abs=1e-9)
    assert counts.recall == pytest.approx(recall, abs=1e-9)
    assert counts.f1 == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-9)
    assert counts.accuracy == pytest.approx(sum(s == la for s, la in zip(said, labels, strict=True)) / 400, abs=1e-9)
    assert counts.yes_ratio == said.count("yes") / 400


def test_counts_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    said, right = ["yes", "no", "yes", "yes", "no"], ["yes", "yes", "no", "yes", "no"]
    counts = pope_counts(said, right)  # type: ignore[arg-type]
    assert counts.f1 == pytest.approx(metrics.f1_score(right, said, pos_label="yes"))
    assert counts.precision == pytest.approx(metrics.precision_score(right, said, pos_label="yes"))


def test_counts_without_any_yes_are_zero_instead_of_an_error() -> None:
    counts = YesNoCounts(true_yes=0, false_yes=0, true_no=3, false_no=0)
    assert (counts.precision, counts.recall, counts.f1, counts.yes_ratio, counts.accuracy) == (0, 0, 0, 0, 1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("yes\n", "yes"),
        ("NO.", "no"),
        ("I know", "other"),
        ("Know", "no"),
        ("", "other"),
        ("a no", "no"),
    ],
)
def test_mme_answer_looks_at_four_letters(text: str, answer: str) -> None:
    assert mme_answer(text) == answer


def test_mme_score_is_accuracy_and_accuracy_of_pairs() -> None:
    score = mme_task_score(["Yes", "No", "yes", "yes", "maybe", "no"], ["yes", "no", "yes", "no", "yes", "no"])
    assert score.accuracy == pytest.approx(100 * 4 / 6)
    assert score.accuracy_plus == pytest.approx(100 / 3)
    assert score.score == pytest.approx(100.0)


@pytest.mark.parametrize("count", [0, 3])
def test_mme_questions_come_in_pairs(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} questions; MME asks two of every image"):
        mme_task_score(["yes"] * count, ["yes"] * count)
