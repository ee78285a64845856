"""What a benchmark asks and how its score is told: independent of any benchmark's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA-1.5 adds to every question with a short answer, in training and in evaluation."""


class BenchmarkError(ValueError):
    """Files of a benchmark that are missing or damaged, or answers that do not fit them; the message names the file."""


@dataclass(frozen=True)
class Question:
    """A question about an image."""

    identity: str | int
    """The benchmark's own id, in the benchmark's own type; the answer file repeats it."""
    text: str
    """What the user says, with the benchmark's instruction, without a placeholder for the image."""
    image: str = ""
    """Name of the image, relative to the image folder; empty = there is none, or ``image_data`` holds it."""
    image_data: bytes | None = None
    """Encoded image, where the question file holds it itself."""
    answers: tuple[str, ...] = ()
    """Right answers; empty where the benchmark keeps them to itself."""
    category: str = ""
    """Group that the benchmark reports for itself."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the question file that answer file or score need."""

    @property
    def has_image(self) -> bool:
        """Whether the question is about an image."""
        return bool(self.image) or self.image_data is not None


@dataclass(frozen=True)
class Measure:
    """A number, and the parts it is made of."""

    value: float
    """The number; a share is between 0 and 1."""
    sums: np.ndarray | None = None
    """(U,) float64: numerators of the U units (images) that are resampled together for an interval; None = none."""
    counts: np.ndarray | None = None
    """(U,) float64: denominators; ``value = sum(sums) / sum(counts)``."""
    percent: bool = True
    """Whether the number is a share, to be shown in percent; else it has a scale of its own."""


Score = dict[str, Measure]
"""Measures by name; the first one is what the benchmark is known for."""


@dataclass(frozen=True)
class BenchmarkFiles:
    """Where a benchmark lies."""

    questions: Path
    """Question file, or the folder of the release where it has many."""
    annotations: Path | None = None
    """File of the right answers, where they are not in the question file."""
    split: str = ""
    """Part of the file to read, where it holds several."""


@dataclass(frozen=True)
class Benchmark:
    """How the questions of a benchmark are read, and what becomes of the answers."""

    name: str
    """Name on the command line and of the answer file."""
    read: Callable[[BenchmarkFiles], list[Question]]
    """Returns the questions in the order of the file; raises ``BenchmarkError``."""
    write: Callable[[Sequence[Question], Sequence[str], Path], list[Path]]
    """Writes the answers in the official form to a folder that exists; returns the files."""
    score: Callable[[Sequence[Question], Sequence[str]], Score]
    """Returns the scores that are a computation on files; empty where only a server can tell."""
    max_new_tokens: int = 16
    """Length of an answer that is long enough; a model that has not ended by then is cut off."""


def mean_by_image(questions: Sequence[Question], values: Sequence[float] | np.ndarray) -> Measure:
    """Return the mean over questions; those of one image are one unit, because they are right or wrong together."""
    if not questions:
        raise BenchmarkError("there is no question to take a mean of; check the question file and the split")
    number: dict[str, int] = {}
    unit = np.array([number.setdefault(_image_key(question), len(number)) for question in questions])
    sums = np.bincount(unit, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(unit).astype(np.float64)
    return Measure(float(sums.sum() / counts.sum()), sums, counts)


def means_by_category(questions: Sequence[Question], values: Sequence[float], main: str = "accuracy") -> Score:
    """Return the mean over all questions, and over those of each category, named ``main/CATEGORY``, sorted."""
    score = {main: mean_by_image(questions, values)}
    for category in sorted({question.category for question in questions} - {""}):
        chosen = [index for index, question in enumerate(questions) if question.category == category]
        score[f"{main}/{category}"] = mean_by_image([questions[i] for i in chosen], [values[i] for i in chosen])
    return score


def _image_key(question: Question) -> str:
    return question.image or f"question {question.identity}"
