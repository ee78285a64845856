"""From the runs' results to the figures: means over seeds with intervals, the Markdown table, the JSON line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs import Finished
from methods import METHODS, Method, method_named
from scipy import stats
from settings import ExperimentConfig

LEVEL = 0.95
"""Confidence level of all intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval."""

    mean: float
    """Mean over the seeds."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""
    values: tuple[float, ...]
    """Value of each seed."""

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "mean": round(self.mean, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
            "seeds": len(self.values),
            "values": [round(value, 4) for value in self.values],
        }


def estimate(values: Sequence[float], num_images: int | None = None) -> Estimate:
    """Return the mean over seeds and an interval for what another seed and other test images would give.

    Two sources of chance, independent of each other, added in quadrature:

        half = sqrt((t_{k-1} s / sqrt(k))^2 + (z sqrt(p (1 - p) / n))^2)

    with the mean p and the standard deviation s over k seeds, t and z the two-sided 95% quantiles of Student's and of
    the normal distribution, and n test images. All seeds share the test images, so the second part does not shrink
    with k. (The first holds a little of it as well; the interval is a little too wide rather than too narrow.)

    Args:
        values: one for each of k >= 2 seeds.
        num_images: n, where the values are shares of n test images; None = the first part alone.

    Raises:
        ValueError: fewer than two values: nothing is known of the spread.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values; an interval over seeds needs at least 2")
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    if num_images is not None:
        half = math.hypot(half, float(stats.norm.ppf((1 + LEVEL) / 2)) * math.sqrt(mean * (1 - mean) / num_images))
        return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), tuple(values))
    return Estimate(mean, mean - half, mean + half, tuple(values))


@dataclass(frozen=True)
class MethodSummary:
    """One method over all seeds."""

    method: Method
    """The method."""
    runs: tuple[Finished, ...]
    """One for each seed."""
    linear: Estimate
    """Linear probe, share of the test images."""
    knn: Estimate
    """Nearest neighbours, share of the test images."""
    text_loss: Estimate | None
    """Next-token loss at the end of training, nats per token; None where it is not trained."""
    images_seen: float
    """Mean over seeds."""
    images_per_step: float
    """Mean over seeds; 0 for the untrained encoder."""

    def monitor(self, name: str) -> float | None:
        """Return a monitor at the end of training, mean over seeds; None where there is none."""
        values = [run.result["monitors"][name] for run in self.runs if name in run.result.get("monitors", {})]
        return math.fsum(values) / len(values) if values else None


def summarize(finished: Iterable[Finished], experiment: ExperimentConfig) -> list[MethodSummary]:
    """Return the methods in the order of the tables.

    Args:
        finished: all runs.
        experiment: says how many images every trained encoder must have seen, to within a percent and a step.

    Raises:
        ValueError: a run saw more or fewer: the comparison would not be fair.
    """
    by_method: dict[str, list[Finished]] = {}
    for run in finished:
        seen, expected = run.result["images_seen"], experiment.images_of(method_named(run.job.method))
        if run.job.kind != "untrained" and abs(seen - expected) > experiment.images_per_step + 0.01 * expected:
            raise ValueError(f"{run.folder} saw {seen} images, the experiment is about {expected} for every method")
        by_method.setdefault(run.job.method, []).append(run)
    return [_summarize(method, by_method[method.name]) for method in METHODS if method.name in by_method]


def _summarize(method: Method, runs: Sequence[Finished]) -> MethodSummary:
    results = [run.result for run in runs]
    images = results[0]["test_images"]
    seen = math.fsum(result["images_seen"] for result in results) / len(results)
    steps = math.fsum(result["steps"] for result in results) / len(results)
    return MethodSummary(
        method=method,
        runs=tuple(runs),
        linear=estimate([result["linear"] for result in results], images),
        knn=estimate([result["knn"] for result in results], images),
        text_loss=estimate([result["text_loss"] for result in results]) if method.trains_text else None,
        images_seen=seen,
        images_per_step=seen / steps if steps else 0.0,
    )


def markdown_table(summaries: Sequence[MethodSummary]) -> str:
    """Return one row for each method."""
    lines = [
        "| method | linear probe | k-NN | text loss | images seen | per step | spread | effective rank |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += ["| " + " | ".join(cells(summary)) + " |" for summary in summaries]
    return "\n".join(lines)


def cells(summary: MethodSummary) -> list[str]:
    """Return what the tables say of a method."""
    text = summary.text_loss
    # Monitors are of the images that are contrasted: without any they say nothing.
    contrasted = bool(summary.monitor("contrast/num_pairs"))
    spread, rank = (
        summary.monitor(f"features/pooled_{name}") if contrasted else None for name in ("std", "effective_rank")
    )
    return [
        summary.method.title,
        percent(summary.linear),
        percent(summary.knn),
        "-" if text is None else f"{text.mean:.3f}",
        f"{summary.images_seen:,.0f}",
        f"{summary.images_per_step:.1f}" if summary.images_per_step else "-",
        "-" if spread is None else f"{spread:.2f}",
        "-" if rank is None else f"{rank:.1f}",
    ]


def percent(value: Estimate) -> str:
    """Return e.g. ``61.2% (59.8 to 62.6)``."""
    return f"{value.mean:.1%} ({100 * value.low:.1f} to {100 * value.high:.1f})"


def figures(summaries: Sequence[MethodSummary], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that ``results.json`` and the last line of the output say.

    Args:
        summaries: the methods.
        facts: what was run: corpus, preset and so on.
    """
    main = [summary for summary in summaries if summary.method.role != "control"]
    control = [summary for summary in summaries if summary.method.role == "control"]
    runs = [run for summary in summaries for run in summary.runs]
    return {
        **facts,
        **_accuracies(main),
        "control": _accuracies(control),
        "images_seen": {summary.method.name: round(summary.images_seen) for summary in summaries},
        "cpu_minutes": round(math.fsum(run.result["cpu_seconds"] for run in runs) / 60, 1),
    }


def _accuracies(summaries: Sequence[MethodSummary]) -> dict[str, Any]:
    return {
        "linear": {summary.method.name: summary.linear.to_dict() for summary in summaries},
        "knn": {summary.method.name: summary.knn.to_dict() for summary in summaries},
        "text_loss": {
            summary.method.name: summary.text_loss.to_dict() for summary in summaries if summary.text_loss is not None
        },
    }
