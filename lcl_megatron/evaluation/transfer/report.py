"""Results for people: a Markdown table that compares encoders, and a picture of curves and scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lcl_megatron.evaluation.transfer.results import (
    Interval,
    MetricSummary,
    ResultError,
    TaskResult,
    read_json,
    write_json,
)

Group = tuple[str, str]
"""Task and test set: what may stand in one table."""


def write_results(results: Sequence[TaskResult], folder: Path) -> None:
    """Write results.json, results.md and results.png into a folder."""
    write_json(results, folder / "results.json")
    (folder / "results.md").write_text(markdown_table(results), encoding="utf-8")
    draw_results(results, folder / "results.png")


def merge_results(paths: Sequence[Path]) -> list[TaskResult]:
    """Return the results of several files or folders.

    Raises:
        ResultError: a file is missing or damaged, or there is none.
    """
    results = [result for path in paths for result in read_json(path)]
    if not results:
        raise ResultError("there are no results in the given files; give those that tools/evaluate.py wrote")
    return results


def group_results(results: Sequence[TaskResult]) -> dict[Group, list[TaskResult]]:
    """Return the results by task and test set, in order of appearance."""
    groups: dict[Group, list[TaskResult]] = {}
    for result in results:
        groups.setdefault((result.task, str(result.data.get("test", ""))), []).append(result)
    return groups


def markdown_table(results: Sequence[TaskResult]) -> str:
    """Return one table per task and test set: a row per encoder, a column per metric, and what the intervals are."""
    lines: list[str] = []
    for (task, test), members in group_results(results).items():
        names = list(dict.fromkeys(metric.name for result in members for metric in result.metrics))
        lines += [f"## {task}: {test}", "", f"| encoder | transfer | seeds | {' | '.join(names)} |"]
        lines += ["|---|---|---:|" + "---:|" * len(names)]
        for result in members:
            metrics = {metric.name: metric for metric in result.metrics}
            seeds = max((len(metric.per_seed) for metric in result.metrics), default=0)
            cells = [_cell(metrics[name]) if name in metrics else "" for name in names]
            name = str(result.encoder["name"]).replace("|", "\\|")
            lines += [f"| {name} | {result.mode or '-'} | {seeds} | {' | '.join(cells)} |"]
        if chances := _chances(members):
            lines += [f"| chance | | | {' | '.join(chances.get(name, '') for name in names)} |"]
        lines += [""]
    lines += [
        "Mean over seeds. In brackets, 95% intervals: *examples* by bootstrap over the test images; *seeds* by",
        "Student's t over the seeds, where there are at least two. Neither covers the seed of the pre-training run.",
        "",
    ]
    return "\n".join(lines)


def _chances(results: Sequence[TaskResult]) -> dict[str, str]:
    return {
        metric.name: _number(metric, metric.chance)
        for result in results
        for metric in result.metrics
        if metric.chance is not None
    }


def _cell(metric: MetricSummary) -> str:
    """Return e.g. ``61.2 (examples 59.8 to 62.6; seeds 60.9 to 61.5)``."""
    intervals = [
        f"{name} {_number(metric, interval[0])} to {_number(metric, interval[1])}"
        for name, interval in (("examples", metric.interval_examples), ("seeds", metric.interval_seeds))
        if interval is not None
    ]
    return _number(metric, metric.mean) + (f" ({'; '.join(intervals)})" if intervals else "")


def _number(metric: MetricSummary, value: float) -> str:
    return f"{100 * value:.1f}" if metric.percent else f"{value:.2f}"


def draw_results(results: Sequence[TaskResult], path: Path) -> None:
    """Draw, for every task and test set, the training curves and the scores with the wider of their intervals.

    Without a curve anywhere there are only the scores.
    """
    groups = group_results(results)
    most_bars = max((len(r.metrics) for r in results), default=1) * max(map(len, groups.values()), default=1)
    columns = 2 if any(result.curves for result in results) else 1
    figure = Figure(figsize=(6 * columns, len(groups) * max(3.0, 1.2 + 0.28 * most_bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), columns, squeeze=False)
    for row, ((task, test), members) in zip(axes, groups.items(), strict=True):
        if columns == 2:
            _draw_curves(row[0], members)
            row[0].set_title(f"{task}: training", loc="left", fontsize=10)
        _draw_bars(row[-1], members)
        row[-1].set_title(f"{task}, {test}: scores, with 95% intervals", loc="left", fontsize=10)
    figure.savefig(path, dpi=110)


def _label(result: TaskResult) -> str:
    name = str(result.encoder["name"])
    # matplotlib takes a label that begins with an underscore for none.
    short = name if len(name) <= 40 else f"...{name[-37:]}"
    return f"{short}, {result.mode}" if result.mode else short


def _draw_curves(axes: Axes, results: Sequence[TaskResult]) -> None:
    for number, result in enumerate(results):
        for index, curve in enumerate(result.curves.values()):
            label = _label(result) if index == 0 else None
            axes.plot(curve.steps, curve.losses, color=f"C{number % 10}", linewidth=1.2, alpha=0.8, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss")
    axes.grid(alpha=0.3)
    if any(result.curves for result in results):
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "nothing is trained", ha="center", va="center", transform=axes.transAxes)


def _draw_bars(axes: Axes, results: Sequence[TaskResult]) -> None:
    names = list(dict.fromkeys(metric.name for result in results for metric in result.metrics))
    height = 0.8 / max(1, len(results))
    for number, result in enumerate(results):
        for index, metric in enumerate(result.metrics):
            factor = 100 if metric.percent else 1
            place = names.index(metric.name) + (number - (len(results) - 1) / 2) * height
            low, high = _widest(metric)
            error = [[factor * (metric.mean - low)], [factor * (high - metric.mean)]]
            label = _label(result) if index == 0 else None
            axes.barh(
                place, factor * metric.mean, 0.9 * height, color=f"C{number % 10}", xerr=error, capsize=2, label=label
            )
            axes.text(
                factor * max(high, metric.mean), place, f"  {_number(metric, metric.mean)}", va="center", fontsize=8
            )
            if metric.chance is not None:
                ends = [place - height / 2, place + height / 2]
                axes.plot([factor * metric.chance] * 2, ends, color="black", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("per cent (dotted: chance)" if all(m.percent for r in results for m in r.metrics) else "score")
    axes.grid(axis="x", alpha=0.3)
    # Where there are curves, their legend says whose colours these are.
    if not any(result.curves for result in results):
        axes.legend(fontsize=8, loc="lower right")


def _widest(metric: MetricSummary) -> Interval:
    """Return the widest interval, or the value itself twice."""
    intervals = [i for i in (metric.interval_examples, metric.interval_seeds) if i is not None]
    # A percentile interval need not hold the mean; a bar's error cannot be negative.
    low = min([metric.mean, *(interval[0] for interval in intervals)])
    high = max([metric.mean, *(interval[1] for interval in intervals)])
    return low, high
