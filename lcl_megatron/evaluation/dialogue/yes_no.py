"""Scores of yes-no benchmarks: POPE and MME, each with its own official way to read an answer.

Li et al., Evaluating Object Hallucination in Large Vision-Language Models, 2023 (arXiv 2305.10355); Fu et al., MME,
2023 (arXiv 2306.13394).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

YesNo = Literal["yes", "no"]


@dataclass(frozen=True)
class YesNoCounts:
    """How often a model said yes and no where yes and no were right; "yes" is the positive class."""

    true_yes: int
    """Said yes, rightly."""
    false_yes: int
    """Said yes, wrongly."""
    true_no: int
    """Said no, rightly."""
    false_no: int
    """Said no, wrongly."""

    @property
    def total(self) -> int:
        """Number of questions."""
        return self.true_yes + self.false_yes + self.true_no + self.false_no

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return _ratio(self.true_yes + self.true_no, self.total)

    @property
    def precision(self) -> float:
        """Share of right answers among those with yes; 0 if there is none."""
        return _ratio(self.true_yes, self.true_yes + self.false_yes)

    @property
    def recall(self) -> float:
        """Share of the yes questions that were answered with yes; 0 if there is none."""
        return _ratio(self.true_yes, self.true_yes + self.false_no)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if both are."""
        return _ratio(2 * self.true_yes, 2 * self.true_yes + self.false_yes + self.false_no)

    @property
    def yes_ratio(self) -> float:
        """Share of answers with yes: far from one half where a model says yes to everything."""
        return _ratio(self.true_yes + self.false_yes, self.total)


def pope_answer(text: str) -> YesNo:
    """Return what POPE takes an answer for: no if its first sentence has the word No, no or not, else yes.

    Words end at spaces only, and commas do not count: ``Nope`` is a yes. An empty answer is one, too.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_counts(texts: Sequence[str], labels: Sequence[YesNo]) -> YesNoCounts:
    """Return the confusion counts of POPE's answers.

    Args:
        texts: the model's answers.
        labels: the right ones, in the same order.
    """
    pairs = [(pope_answer(text), label) for text, label in zip(texts, labels, strict=True)]
    return YesNoCounts(*(pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))))


def mme_answer(text: str) -> Literal["yes", "no", "other"]:
    """Return what MME takes an answer for: what its first four letters hold, yes before no, in any case."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


@dataclass(frozen=True)
class MmeTaskScore:
    """A task of MME."""

    accuracy: float
    """Share of right answers, 0 to 100."""
    accuracy_plus: float
    """Share of images with both questions answered rightly, 0 to 100."""

    @property
    def score(self) -> float:
        """The task's score, 0 to 200."""
        return self.accuracy + self.accuracy_plus


def mme_task_score(texts: Sequence[str], labels: Sequence[YesNo]) -> MmeTaskScore:
    """Return the score of one task, whose questions stand in pairs, two per image.

    Raises:
        ValueError: there are no questions, or an odd number.
    """
    if not texts or len(texts) % 2:
        raise ValueError(f"{len(texts)} questions; MME asks two of every image, and they stand one behind the other")
    right = [mme_answer(text) == label for text, label in zip(texts, labels, strict=True)]
    both = sum(first and second for first, second in zip(right[::2], right[1::2], strict=True))
    return MmeTaskScore(100 * sum(right) / len(right), 100 * both / (len(right) // 2))


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
