"""Reading back what a run reported: the other side of ``metrics_logger``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lcl_megatron.training.metrics_logger import METRICS_FILE

XAxis = Literal["step", "images"]
"""Horizontal axis: optimizer steps, or images consumed (the paper's unit)."""


class Series(NamedTuple):
    """The values of one metric."""

    reports: np.ndarray
    """(n,) int64, which reports of the run hold the metric."""
    values: np.ndarray
    """(n,) float64, NaN and infinity where the run reported them."""


@dataclass(frozen=True)
class RunMetrics:
    """The reports of one run."""

    name: str
    """How the run is called in legends and in the table."""
    steps: np.ndarray
    """(reports,) int64, optimizer steps done."""
    times: np.ndarray
    """(reports,) float64, seconds since 1970."""
    series: dict[str, Series] = field(default_factory=dict)
    """Metric name -> its values."""

    def points(self, metric: str, axis: XAxis) -> tuple[np.ndarray, np.ndarray]:
        """Return horizontal coordinates and values of a metric, non-finite values included.

        Raises:
            ValueError: images are asked for and the run did not report them.
        """
        reports, values = self.series[metric]
        if axis == "step":
            return self.steps[reports], values
        consumed = self.series.get("data/consumed_images")
        if consumed is None or len(consumed.reports) != len(self.steps):
            raise ValueError(f"run {self.name} has reports without data/consumed_images; draw it over steps")
        return consumed.values[reports], values


def read_metrics(path: Path, name: str = "") -> RunMetrics:
    """Read the reports of one run.

    Args:
        path: ``metrics.jsonl``, or the log folder that holds it.
        name: for legends; empty = the name of the log folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than an unfinished last one is not a report, or there is no report at all.
    """
    path = path / METRICS_FILE if path.is_dir() else path
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    reports: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            report = {key: float(value) for key, value in json.loads(line).items()}
            reports.append(report | {"step": int(report["step"]), "time": report["time"]})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break  # the run died, or is writing just now
            raise ValueError(f"{path}:{number}: not a report of a run: {line[:80]!r}") from error
    if not reports:
        raise ValueError(f"{path} holds no report yet; the first is written after logging.log_interval steps")
    names = sorted({key for report in reports for key in report} - {"step", "time"})
    return RunMetrics(
        name=name or path.resolve().parent.name,
        steps=np.array([report["step"] for report in reports], dtype=np.int64),
        times=np.array([report["time"] for report in reports]),
        series={key: _series_of(reports, key) for key in names},
    )


def _series_of(reports: Sequence[dict[str, float]], metric: str) -> Series:
    held = [index for index, report in enumerate(reports) if metric in report]
    return Series(np.array(held, dtype=np.int64), np.array([reports[index][metric] for index in held]))
