"""Test sets that models answer with text, and how trained models take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from lcl_megatron.evaluation.transfer.fit import Curve
from lcl_megatron.evaluation.transfer.results import MetricSummary, TaskResult, Trial
from lcl_megatron.evaluation.transfer.session import Session
from lcl_megatron.evaluation.vision_language.assembly import Assembled, load_model

Scores = TypeVar("Scores")
"""What a task knows of one model on one test set."""


class Exam(Protocol[Scores]):
    """A test set."""

    @property
    def data(self) -> dict[str, Any]:
        """Its name (``test``) and size, for results."""
        ...

    def take(self, assembled: Assembled, name: str) -> Scores:
        """Let a model answer, write its answers below its name, and return their scores, equal on all ranks.

        Args:
            assembled: the model, in evaluation mode.
            name: of the model, for files.
        """
        ...

    def metrics(self, by_seed: Mapping[int, Scores]) -> tuple[MetricSummary, ...]:
        """Return summaries of the scores of one model per seed."""
        ...


class Trained(NamedTuple):
    """A model of one seed."""

    assembled: Assembled
    """The model, in evaluation mode."""
    name: str
    """For files and folders."""
    encoder: dict[str, Any]
    """``ImageEncoder.describe()`` of its encoder, before the training."""
    curves: dict[str, Curve]
    """Of its stages."""


def score_trained(
    trial: Trial,
    train: Callable[[int], Trained],
    seeds: Sequence[int],
    exams: Sequence[Exam[Scores]],
    data: dict[str, Any],
) -> list[TaskResult]:
    """Train a model for each seed and let it take all exams; one result per exam.

    Args:
        trial: task, mode and settings; gets the curves.
        train: from a seed to its model; one model at a time is needed.
        seeds: at least one.
        exams: test sets.
        data: what results say of the training data.
    """
    scores: list[dict[int, Scores]] = [{} for _ in exams]
    encoder: dict[str, Any] = {}
    for seed in seeds:
        model = train(seed)
        encoder = encoder or model.encoder
        trial.curves.update(model.curves)
        for exam, found in zip(exams, scores, strict=True):
            found[seed] = exam.take(model.assembled, model.name)
    return [
        trial.result(encoder, data | exam.data, exam.metrics(found)) for exam, found in zip(exams, scores, strict=True)
    ]


def score_saved(
    task: str, folder: Path, exams: Sequence[Exam[Scores]], settings: dict[str, Any], session: Session
) -> list[TaskResult]:
    """Let a model that an earlier call has saved take exams; one result per exam.

    Args:
        task: name of the task, for results.
        folder: of the model, whose name stands for it in tables.
        exams: test sets.
        settings: of the task, for results.
        session: ranks and folders.

    Raises:
        AssemblyError, EncoderError: see ``load_model``; and what the exams raise.
    """
    assembled = load_model(folder, session.replicas.device)
    encoder = session.replicas.from_first(assembled.encoder.describe()) | {"name": folder.name}
    results = []
    for exam in exams:
        trial = Trial(task, "", settings | {"language_model": assembled.recipe.language_model})
        scores = exam.take(assembled, folder.name)
        results.append(trial.result(encoder, exam.data, exam.metrics({0: scores})))
    return results
