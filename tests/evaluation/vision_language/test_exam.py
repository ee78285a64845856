"""Exams. Oracle: an exam whose score is a number that the test chose; that of models is in the tests of the tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lcl_megatron.evaluation.transfer.fit import Curve
from lcl_megatron.evaluation.transfer.results import MetricSummary, Trial, summarize
from lcl_megatron.evaluation.vision_language.assembly import Assembled
from lcl_megatron.evaluation.vision_language.exam import Trained, score_trained


@dataclass
class Known:
    """An exam that knows the scores of models by their names."""

    test: str
    scores: dict[str, float]
    taken: list[Any] = field(default_factory=list)

    @property
    def data(self) -> dict[str, Any]:
        return {"test": self.test}

    def take(self, assembled: Assembled, name: str) -> float:
        self.taken.append(assembled)
        return self.scores[name]

    def metrics(self, by_seed: Mapping[int, float]) -> tuple[MetricSummary, ...]:
        return (summarize("score", by_seed),)


def test_every_model_takes_every_exam_and_a_result_is_of_all_seeds() -> None:
    exams = [Known("easy", {"a-3": 0.5, "a-5": 0.75}), Known("hard", {"a-3": 0.25, "a-5": 0.0})]
    models: dict[int, Any] = {3: object(), 5: object()}
    curves = {seed: Curve((1,), (float(seed),), (0.1,)) for seed in models}

    def train(seed: int) -> Trained:
        # A model that is trained along is another one afterwards; what counts is what it was made of.
        return Trained(models[seed], f"a-{seed}", {"name": "a", "fingerprint": str(seed)}, {str(seed): curves[seed]})

    trial = Trial("captioning", "full", {"num_beams": 1})
    easy, hard = score_trained(trial, train, (3, 5), exams, {"train": "pairs"})
    for exam in exams:
        assert exam.taken == [models[3], models[5]]
    assert easy.metrics[0].per_seed == {"3": 0.5, "5": 0.75}
    assert hard.metrics[0].per_seed == {"3": 0.25, "5": 0.0}
    for result, test in ((easy, "easy"), (hard, "hard")):
        assert (result.task, result.mode, result.settings) == ("captioning", "full", {"num_beams": 1})
        assert result.data == {"train": "pairs", "test": test}
        assert result.encoder == {"name": "a", "fingerprint": "3"}
        assert result.curves == {"3": curves[3], "5": curves[5]}
