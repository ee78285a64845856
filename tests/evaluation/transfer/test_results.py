"""Results and their intervals.

Oracles: the normal approximation of a share for the bootstrap, scipy's confidence interval of a mean for the seeds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lcl_megatron.evaluation.transfer.fit import Curve
from lcl_megatron.evaluation.transfer.results import (
    MetricSummary,
    ResultError,
    TaskResult,
    Trial,
    UnitScores,
    read_json,
    summarize,
    summarize_units,
    write_json,
)


def make_result(name: str = "ours", task: str = "classification", test: str = "cats", **fields: Any) -> TaskResult:
    metrics = (
        MetricSummary("top-1", {"0": 0.5, "1": 0.6}, 0.55, (0.5, 0.58), (0.1, 1.0), 0.1),
        MetricSummary("CIDEr", {"0": 81.25}, 81.25, None, None, percent=False),
    )
    values: dict[str, Any] = {
        "task": task,
        "encoder": {"name": name},
        "mode": "frozen",
        "data": {"test": test},
        "settings": {"fit": {"lr": 0.1}},
        "metrics": metrics,
        "curves": {"0": Curve((1, 2), (3.0, 2.5), (0.1, 0.05)), "1": Curve((1, 2), (3.1, 2.4), (0.1, 0.05))},
        "versions": {"torch": "2"},
        "seconds": 1.5,
    }
    return TaskResult(**values | fields)


def test_interval_over_examples_is_that_of_a_share() -> None:
    hits = (np.arange(400) < 120).astype(np.int64)
    summary = summarize_units("top-1", {0: UnitScores(hits, np.ones(400, np.int64))}, chance=0.1)
    assert summary.mean == 0.3
    assert summary.interval_seeds is None
    half = 1.96 * (0.3 * 0.7 / 400) ** 0.5
    # A thousand resamples know the quantile to about a tenth of the half width.
    np.testing.assert_allclose(summary.interval_examples, [0.3 - half, 0.3 + half], atol=0.15 * half)
    assert (summary.per_seed, summary.chance, summary.percent) == ({"0": 0.3}, 0.1, True)


def test_captions_of_an_image_are_drawn_together() -> None:
    """With five equal captions per image the interval is as wide as with one, not narrower by sqrt(5)."""
    hits = (np.arange(200) < 60).astype(np.int64)
    one = summarize_units("IR@1", {0: UnitScores(hits, np.ones(200, np.int64))})
    five = summarize_units("IR@1", {0: UnitScores(5 * hits, np.full(200, 5))})
    assert one.interval_examples == five.interval_examples


def test_interval_over_seeds_is_student_s() -> None:
    values = {0: 0.5, 1: 0.56, 2: 0.53}
    expected = stats.t.interval(0.95, 2, np.mean(list(values.values())), stats.sem(list(values.values())))
    summary = summarize("top-1", values)
    np.testing.assert_allclose(summary.interval_seeds, expected)
    assert summary.interval_examples is None
    scores = {seed: UnitScores(np.array([value]), np.array([1.0])) for seed, value in values.items()}
    np.testing.assert_allclose(summarize_units("top-1", scores).interval_seeds, expected)


def test_metrics_that_are_no_means_bring_their_own_function() -> None:
    numbers = np.random.default_rng(1).normal(5, 1, 100)
    summary = summarize("median", {0: 5.0}, lambda units: float(np.median(numbers[units])), 100, percent=False)
    low, high = summary.interval_examples or (0, 0)
    assert low < np.median(numbers) < high
    assert 0.1 < high - low < 1.0
    assert not summary.percent


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    results = [make_result(), make_result("theirs", curves={})]
    write_json(results, tmp_path / "a" / "results.json")
    assert read_json(tmp_path / "a" / "results.json") == results
    assert read_json(tmp_path / "a") == results


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"there are no results at .*results.json; give a folder or file that tools/evaluate.py wrote"),
        ("no json", "holds no results of tools/evaluate.py"),
        ("[]", "holds no results of tools/evaluate.py"),
        ('{"format": 1, "results": [{"task": "a"}]}', "holds no results of tools/evaluate.py .KeyError"),
        ('{"format": 7, "results": []}', "has format 7; this version reads 1"),
    ],
)
def test_what_is_no_result_is_explained(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ResultError, match=message):
        read_json(tmp_path)


def test_a_trial_gives_what_its_results_have_in_common() -> None:
    trial = Trial("classification", "frozen", {"steps": 3})
    trial.curves["0"] = Curve((1,), (0.5,), (0.1,))
    first, second = (trial.result({"name": "a"}, {"test": test}, ()) for test in ("x", "y"))
    assert (first.data, second.data) == ({"test": "x"}, {"test": "y"})
    assert 0 <= first.seconds <= second.seconds
    for result in (first, second):
        assert (result.task, result.mode, result.settings) == ("classification", "frozen", {"steps": 3})
        assert result.curves == {"0": Curve((1,), (0.5,), (0.1,))}
        assert {"python", "torch", "numpy", "device"} <= result.versions.keys()
        assert json.dumps(result.versions)
