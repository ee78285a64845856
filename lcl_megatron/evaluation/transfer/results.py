"""What a task found: scores per seed with what chance leaves open, the settings, and the versions that ran.

Two intervals, which answer two questions. *Examples*: how far the score would move on another test set of the same
size (percentile bootstrap over the test images, of the mean over seeds). *Seeds*: how far it would move with other
random heads and another order of the training examples (Student's t over the seeds; needs two). Neither covers the
seed of the pre-training run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from lcl_megatron.evaluation.transfer.fit import Curve
from lcl_megatron.versions import software_versions

FORMAT = 1
"""Of results.json."""
RESAMPLES = 1000
"""Bootstrap samples."""
Interval = tuple[float, float]
"""Lower and upper end of a 95% interval."""


class ResultError(ValueError):
    """Results that cannot be read or put together; the message names the file."""


@dataclass(frozen=True)
class UnitScores:
    """A metric that is a ratio of sums over units, the things that are drawn anew by the bootstrap: test images.

    An accuracy has one example per image; image retrieval has five captions per image, which stay together.
    """

    sums: np.ndarray
    """(U,) what each unit adds to the numerator."""
    counts: np.ndarray
    """(U,) what each unit adds to the denominator."""

    @property
    def value(self) -> float:
        """The metric, a share."""
        return float(self.sums.sum() / self.counts.sum())

    def resampled(self, units: np.ndarray) -> float:
        """Return the metric of some units, repeated ones counted again."""
        return float(self.sums[units].sum() / self.counts[units].sum())


@dataclass(frozen=True)
class MetricSummary:
    """One metric of one encoder on one test set."""

    name: str
    """e.g. ``top-1``."""
    per_seed: dict[str, float]
    """Value of every seed."""
    mean: float
    """Mean over seeds."""
    interval_examples: Interval | None
    """95%, bootstrap over test images; None = not computed."""
    interval_seeds: Interval | None
    """95%, Student's t over seeds; None = there is only one."""
    chance: float | None = None
    """Expected value without looking; None = not known."""
    percent: bool = True
    """Whether it is a share, written in percent."""


@dataclass(frozen=True)
class TaskResult:
    """One encoder on one task and one test set."""

    task: str
    """e.g. ``classification``."""
    encoder: dict[str, Any]
    """``ImageEncoder.describe()``."""
    mode: str
    """``frozen`` or ``full``; empty where nothing is trained."""
    data: dict[str, Any]
    """``test`` names the test set; sizes and files."""
    settings: dict[str, Any]
    """All settings of the task."""
    metrics: tuple[MetricSummary, ...]
    """Scores."""
    curves: dict[str, Curve]
    """Training curve of every seed."""
    versions: dict[str, str]
    """``software_versions`` of what ran, and ``device``."""
    seconds: float
    """Duration, training and scoring."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> TaskResult:
        """Return the result that ``to_dict`` described; raises KeyError or TypeError for anything else."""
        entries: list[dict[str, Any]] = [
            {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
            for entry in fields["metrics"]
        ]
        metrics = tuple(MetricSummary(**entry) for entry in entries)
        curves = {
            seed: Curve(**{name: tuple(values) for name, values in entry.items()})
            for seed, entry in fields["curves"].items()
        }
        return cls(**fields | {"metrics": metrics, "curves": curves})


@dataclass(frozen=True)
class Trial:
    """One encoder at one task, from when this object is made: what its results on all test sets have in common."""

    task: str
    """e.g. ``classification``."""
    mode: str
    """``frozen`` or ``full``; empty where nothing is trained."""
    settings: dict[str, Any]
    """All settings of the task; what is found on the way is added."""
    curves: dict[str, Curve] = field(default_factory=dict)
    """Training curve of every seed; added when it is known."""
    begin: float = field(default_factory=time.monotonic)
    """When it began."""

    def result(self, encoder: dict[str, Any], data: dict[str, Any], metrics: tuple[MetricSummary, ...]) -> TaskResult:
        """Return the result on one test set, as it stands now; see ``TaskResult`` for the arguments."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return TaskResult(
            task=self.task,
            encoder=encoder,
            mode=self.mode,
            data=data,
            settings=self.settings,
            metrics=metrics,
            curves=self.curves,
            versions=software_versions() | {"device": device},
            seconds=time.monotonic() - self.begin,
        )


def summarize(
    name: str,
    values: Mapping[int, float],
    resampled: Callable[[np.ndarray], float] | None = None,
    num_units: int = 0,
    *,
    chance: float | None = None,
    percent: bool = True,
) -> MetricSummary:
    """Return mean and intervals of a metric.

    Args:
        name: of the metric.
        values: by seed.
        resampled: the mean over seeds of the metric on test units drawn with repetition, given as (num_units,) int64
            indices; None = no interval over examples.
        num_units: number of test units.
        chance: expected value without looking.
        percent: whether it is a share.
    """
    numbers = np.array(list(values.values()))
    over_examples = None
    if resampled is not None:
        random = np.random.default_rng(0)
        samples = [resampled(random.integers(0, num_units, num_units)) for _ in range(RESAMPLES)]
        low, high = np.quantile(samples, [0.025, 0.975])
        over_examples = (float(low), float(high))
    over_seeds = None
    if len(numbers) > 1:
        half = float(stats.t.ppf(0.975, len(numbers) - 1) * numbers.std(ddof=1) / np.sqrt(len(numbers)))
        over_seeds = (float(numbers.mean()) - half, float(numbers.mean()) + half)
    per_seed = {str(seed): float(value) for seed, value in values.items()}
    return MetricSummary(name, per_seed, float(numbers.mean()), over_examples, over_seeds, chance, percent)


def summarize_units(name: str, scores: Mapping[int, UnitScores], chance: float | None = None) -> MetricSummary:
    """Return ``summarize`` of a share whose numerators and denominators are known per test unit, by seed."""

    def resampled(units: np.ndarray) -> float:
        return float(np.mean([score.resampled(units) for score in scores.values()]))

    num_units = len(next(iter(scores.values())).sums)
    return summarize(name, {seed: s.value for seed, s in scores.items()}, resampled, num_units, chance=chance)


def write_json(results: Sequence[TaskResult], path: Path) -> None:
    """Write results.json; its folder is made if it is missing, and the file replaced in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    document = {"format": FORMAT, "results": [result.to_dict() for result in results]}
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> list[TaskResult]:
    """Read results.json, or the one in a folder.

    Raises:
        ResultError: there is none, or it is something else.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ResultError(f"{file} has format {document['format']}; this version reads {FORMAT}")
        return [TaskResult.from_dict(fields) for fields in document["results"]]
    except FileNotFoundError:
        raise ResultError(
            f"there are no results at {file}; give a folder or file that tools/evaluate.py wrote"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{file} holds no results of tools/evaluate.py ({type(error).__name__}: {error})") from error
