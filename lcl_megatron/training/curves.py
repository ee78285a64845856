"""Curves of one or several runs, on one page that can be sent to somebody.

Reads what ``metrics_logger`` wrote. The page is a single HTML file with vector drawings inside, so it opens without
a network and without this package; any other suffix (``.png``, ``.pdf``, ``.svg``) gives one picture.

The panels stand in the order of the questions one asks of such a run: do both losses fall, does the contrast work,
are the features alive, is the optimizer calm, is the machine busy. A collapsing encoder shows in the third row
while the text loss looks normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lcl_megatron.data.pages.drawing import PALETTE, figure, picture
from lcl_megatron.data.pages.page import Html, element, svg_image, write_page
from lcl_megatron.training.metrics_reader import RunMetrics, Series, XAxis, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_POINTS = 1500
_SMOOTHING_SHARE = 0.02
_DASHES: tuple[Literal["-", "--"], ...] = ("-", "--")


@dataclass(frozen=True)
class Panel:
    """One drawing."""

    title: str
    """Heading."""
    unit: str
    """Label of the vertical axis."""
    metrics: tuple[tuple[str, str], ...]
    """Metric and its legend label; the second of two is dashed."""
    scale: float = 1.0
    """Factor on the values, e.g. 100 for percent."""
    is_log: bool = False
    """Logarithmic vertical axis."""
    from_zero: bool = False
    """Start the vertical axis at 0: quantities of which a small part would look like a large change."""
    guess: tuple[str, Callable[[np.ndarray], np.ndarray]] | None = None
    """Metric and function of it that give the level of pure guessing, drawn as a dotted line."""


def _guessing_accuracy(num_negatives: np.ndarray) -> np.ndarray:
    return 1 / (num_negatives + 1)


def _guessing_loss(num_negatives: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(num_negatives + 1))


PANELS = (
    Panel("Generation loss", "nats per text token", (("loss/generation", ""),)),
    Panel("Contrastive loss", "nats per pair", (("loss/contrastive", ""),),
          guess=("contrast/num_negatives", _guessing_loss)),
    Panel("Latent regression loss", "mean squared error", (("loss/latent_regression", ""),)),
    Panel("Total loss", "nats", (("loss/total", ""),)),
    Panel("Retrieval within the batch", "top-1 accuracy, %",
          (("contrast/image_to_context_accuracy", "image to context"),
           ("contrast/context_to_image_accuracy", "context to image")),
          scale=100, from_zero=True, guess=("contrast/num_negatives", _guessing_accuracy)),
    Panel("Logit scale", "1 / temperature", (("contrast/logit_scale", ""),)),
    Panel("Contrastive pairs", "per step", (("contrast/num_pairs", "pairs"), ("contrast/num_negatives", "negatives"))),
    Panel("Repeats among the pairs", "per step",
          (("contrast/num_same_image", "same image"), ("contrast/num_same_context", "same context")), from_zero=True),
    Panel("Feature spread", "standard deviation", (("features/pooled_std", ""),), from_zero=True),
    Panel("Effective rank", "dimensions",
          (("features/pooled_effective_rank", "pooled latents"),
           ("features/context_effective_rank", "context features")), from_zero=True),
    Panel("Gradient norm", "before clipping", (("optimizer/grad_norm", ""),), is_log=True),
    Panel("Learning rate", "", (("optimizer/learning_rate", ""),)),
    Panel("Images", "per second", (("perf/images_per_s", ""),), from_zero=True),
    Panel("Tokens", "per second", (("perf/tokens_per_s", ""),), from_zero=True),
    Panel("Step time", "ms", (("perf/step_ms", "step"), ("perf/data_wait_ms", "waiting for data")), from_zero=True),
    Panel("Own work of a rank", "ms per step",
          (("perf/slowest_rank_ms", "slowest rank"), ("perf/median_rank_ms", "median rank")), from_zero=True),
    Panel("Model FLOPs utilization", "% of peak", (("perf/model_flops_utilization", ""),), scale=100,
          from_zero=True),
    Panel("Row fill", "% of positions", (("data/fill", ""),), scale=100),
    Panel("Undecodable images", "", (("data/bad_images", ""),), from_zero=True),
)  # fmt: skip
"""Every panel, in page order; one without data is left out."""


def write_curves(paths: Sequence[Path], output: Path, names: Sequence[str] = (), x_axis: XAxis = "step") -> None:
    """Draw the runs and write the page, or one picture.

    Args:
        paths: log folders or ``metrics.jsonl`` files, one per run.
        output: ``.html`` for the page; ``.png``, ``.pdf`` or ``.svg`` for one picture.
        names: names of the runs, one per path; empty = names of their folders.
        x_axis: horizontal axis.

    Raises:
        ValueError: names do not match paths, the suffix is unknown, or a file is not a run's.
    """
    if names and len(names) != len(paths):
        raise ValueError(f"{len(names)} names for {len(paths)} runs; give one name per run, or none")
    suffix = output.suffix.lower()
    if suffix not in (".html", ".png", ".pdf", ".svg"):
        raise ValueError(f"cannot write {output.name}; choose one of .html, .png, .pdf, .svg")
    runs = [read_metrics(path, name) for path, name in zip(paths, names or [""] * len(paths), strict=True)]
    output.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".html":
        output.write_text(render_page(runs, x_axis), encoding="utf-8")
    else:
        output.write_bytes(_draw(_panels_of(runs), runs, x_axis, suffix[1:], columns=3))


def render_page(runs: Sequence[RunMetrics], x_axis: XAxis = "step") -> str:
    """Return the page: heading, one drawing per panel, table of final values."""
    drawings = [svg_image(_draw([panel], runs, x_axis, "svg", columns=1), panel.title) for panel in _panels_of(runs)]
    legend = (
        element("li", element("span", style=f"background:{_colour(index)}"), run.name) for index, run in enumerate(runs)
    )
    return write_page(
        "Training curves",
        _STYLE,
        element("ul", *legend),
        element("p", "Faint: every report. Strong: centred mean over 2% of the reports. "
                "Red cross: a value that is not finite."),
        element("div", *drawings, class_="drawings"),
        element("h2", "Final values"),
        element("div", element("table", *_final_values(runs)), class_="scroll"),
    )  # fmt: skip


def _panels_of(runs: Sequence[RunMetrics]) -> list[Panel]:
    """Return the panels for which some run has a value."""
    return [panel for panel in PANELS if any(name in run.series for run in runs for name, _ in panel.metrics)]


def _draw(panels: Sequence[Panel], runs: Sequence[RunMetrics], x_axis: XAxis, kind: str, columns: int) -> bytes:
    """Return a picture of panels in a grid, in the format ``kind``."""
    rows = math.ceil(len(panels) / columns)
    with figure(4.6 * columns, 2.9 * rows) as drawn:
        axes = drawn.subplots(rows, columns, squeeze=False).reshape(-1)
        for panel, axis in zip(panels, axes, strict=False):
            _draw_panel(axis, panel, runs, x_axis)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if columns > 1:  # a picture that stands alone; the page names its runs itself
            _draw_run_names(drawn, runs)
        return picture(drawn, kind)


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunMetrics], x_axis: XAxis) -> None:
    """Draw one panel: every run in its colour, raw values faintly under their smoothed line."""
    from matplotlib.ticker import EngFormatter

    for index, run in enumerate(runs):
        for (name, _), dash in zip(panel.metrics, _DASHES, strict=False):
            if name in run.series:
                _draw_metric(axes, *run.points(name, x_axis), panel.scale, {"color": _colour(index), "linestyle": dash})
        if panel.guess is not None and panel.guess[0] in run.series:
            x, count = run.points(panel.guess[0], x_axis)
            level = panel.guess[1](count) * panel.scale
            axes.plot(*_thin_out(x, level), color=_colour(index), alpha=0.6, linewidth=1, linestyle=":")
    axes.set_title(panel.title, loc="left")
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("optimizer step" if x_axis == "step" else "images consumed")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.is_log:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(True)
    axes.set_axisbelow(True)
    _draw_key(axes, panel, runs)


def _draw_metric(axes: Axes, x: np.ndarray, y: np.ndarray, scale: float, style: dict[str, Any]) -> None:
    """Draw one metric of one run; reports with a value that is not finite are red crosses at the bottom."""
    finite = np.isfinite(y)
    values = y[finite] * scale
    axes.plot(*_thin_out(x[finite], values), color=style["color"], alpha=0.25, linewidth=0.8)
    axes.plot(*_thin_out(x[finite], _smooth(values)), linewidth=1.6, **style)
    broken = x[~finite]
    if len(broken) > 0:
        bottom = axes.get_xaxis_transform()
        axes.plot(broken, np.full(len(broken), 0.03), "x", color="#cc0000", markersize=5, transform=bottom)


def _draw_key(axes: Axes, panel: Panel, runs: Sequence[RunMetrics]) -> None:
    """Explain line styles: the metrics of a panel that shows two, and the dotted line of guessing."""
    from matplotlib.lines import Line2D

    grey = "#444444"
    lines = [
        Line2D([], [], color=grey, linewidth=1.6, linestyle=dash, label=label)
        for (name, label), dash in zip(panel.metrics, _DASHES, strict=False)
        if label and any(name in run.series for run in runs)
    ]
    if panel.guess is not None and any(panel.guess[0] in run.series for run in runs):
        lines.append(Line2D([], [], color=grey, linewidth=1, linestyle=":", label="guessing"))
    if lines:
        axes.legend(handles=lines, fontsize=7.5, frameon=False)


def _draw_run_names(figure: Figure, runs: Sequence[RunMetrics]) -> None:
    """Name the runs' colours once, above all panels."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=_colour(index), linewidth=2, label=run.name) for index, run in enumerate(runs)]
    figure.legend(handles=lines, fontsize=10, frameon=False, loc="outside upper left", ncols=min(6, len(runs)))


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Return a running mean, centred, over 2% of the reports; at the ends over the reports that exist.

    A centred mean does not lag behind, as an exponential one does: two runs with different report intervals compare.
    """
    half = int(len(values) * _SMOOTHING_SHARE / 2)
    if half == 0:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    begin, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((total[end] - total[begin]) / (end - begin))


def _thin_out(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most ``_MAX_POINTS`` points: of each stretch the lowest and the highest, so that spikes stay."""
    if len(y) <= _MAX_POINTS:
        return x, y
    keep: set[int] = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), _MAX_POINTS // 2 - 1):
        keep |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    index = np.array(sorted(keep))
    return x[index], y[index]


def _final_values(runs: Sequence[RunMetrics]) -> Iterator[Html]:
    """Yield the table's rows: last values, one column per run; the mean of the last 2% of the reports stands beside."""
    yield element("tr", element("th"), *(element("th", run.name, colspan=2) for run in runs))
    yield element("tr", element("th"), *(element("th", name) for _ in runs for name in ("last", "mean of last 2%")))
    steps = (element("td", f"{run.steps[-1]:,}", colspan=2) for run in runs)
    yield element("tr", element("td", "steps"), *steps)
    hours = (element("td", f"{(run.times[-1] - run.times[0]) / 3600:.2f}", colspan=2) for run in runs)
    yield element("tr", element("td", "hours between first and last report"), *hours)
    for name in sorted({name for run in runs for name in run.series}):
        cells = (element("td", value) for run in runs for value in _last_values(run.series.get(name)))
        yield element("tr", element("td", name), *cells)


def _last_values(series: Series | None) -> tuple[str, str]:
    """Return the last value and the mean of the last 2% of the values."""
    if series is None:
        return "", ""
    tail = series.values[-max(1, int(len(series.values) * _SMOOTHING_SHARE)) :]
    return _number(series.values[-1]), _number(np.mean(tail))


def _number(value: float) -> str:
    """Return counts in full, with thousands separators, and other numbers with five digits."""
    if math.isfinite(value) and abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.5g}"


_STYLE = """
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem }
li span { display: inline-block; width: 1.4rem; height: .3rem; margin-right: .5rem; vertical-align: middle }
"""
