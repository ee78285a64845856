"""Test sets that models answer with text, and how a trained model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

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
