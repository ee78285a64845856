"""The report: one page that can be sent to somebody, with everything that is needed to judge the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from methods import METHODS
from settings import Preset
from summary import MethodSummary, cells, percent

from lcl_megatron.data.pages.drawing import PALETTE, figure, picture
from lcl_megatron.data.pages.page import Html, cards, element, svg_image, table, write_page
from lcl_megatron.training.metrics_reader import RunMetrics, read_metrics
from lcl_megatron.versions import software_versions

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAD = (
    "method", "linear probe", "k-NN", "text loss at the end", "images seen", "images per step", "feature spread",
    "effective rank",
)  # fmt: skip
MONITORS = (
    ("features/pooled_std", "Spread of pooled features", "1 = even over the sphere, 0 = one point"),
    ("features/pooled_effective_rank", "Effective rank of pooled features", "directions"),
    ("contrast/pair_similarity", "Alignment", "cosine of image and own context"),
    ("contrast/background_similarity", "Background similarity", "cosine of image and other contexts"),
    ("features/context_std", "Spread of context features", "1 = even over the sphere, 0 = one point"),
    ("loss/contrastive", "Contrastive loss", "nats; reported also where its weight is 0"),
)
"""Metric, title, unit of the curves of collapse."""


def write_report(
    summaries: Sequence[MethodSummary], result: Mapping[str, Any], preset: Preset, command: str, output: Path
) -> None:
    """Write the page.

    Args:
        summaries: all methods.
        result: what ``results.json`` says.
        preset: what was run.
        command: command line, to be shown.
        output: file to write.
    """
    main = [summary for summary in summaries if summary.method.role != "control"]
    control = [summary for summary in summaries if summary.method.role == "control"]
    page = write_page(
        f"Collapse without contrast: {result['corpus']}",
        _STYLE,
        element("p", _INTRODUCTION),
        cards(_cards(main, result)),
        element("h2", "Frozen encoders on held-out images"),
        svg_image(_bars(main, control), "Accuracy of the linear probe and of nearest neighbours by method"),
        table(HEAD, map(cells, main)),
        element("p", _intervals(main)),
        element("h2", "The text loss does not show it"),
        element("p", _TEXT_LOSS),
        _legend([summary for summary in main if _curves(summary)]),
        element("div", *_text_curves(main, control), class_="drawings"),
        element("h2", "The monitors do"),
        element("p", "Mean over seeds; shaded: from the lowest to the highest seed."),
        element("div", *_monitor_curves(main), class_="drawings"),
        *_control(control, result),
        element("h2", "How it was made"),
        element("pre", f"{command}\n\n{_versions(result, summaries)}"),
        element("p", "Every method has the settings below and differs from them as stated."),
        table(("method", "differs in"), _differences(summaries), class_="words"),
        element("pre", _settings(preset)),
    )
    output.write_text(page, encoding="utf-8")


def _cards(main: Sequence[MethodSummary], result: Mapping[str, Any]) -> list[tuple[str, object, str]]:
    named = {summary.method.name: summary for summary in main}
    shown = ("lcl", "clip", "generation_only", "untrained", "supervised")
    accuracy = [
        (named[name].method.title, f"{named[name].linear.mean:.1%}", f"linear probe, {percent(named[name].linear)}")
        for name in shown
        if name in named
    ]
    runs = sum(len(summary.runs) for summary in main)
    return [*accuracy, ("CPU time", f"{result['cpu_minutes']:.0f} min", f"all runs; {runs} in the main table")]


def _control(control: Sequence[MethodSummary], result: Mapping[str, Any]) -> list[Html]:
    if not control:
        return []
    return [
        element("h2", "Control: where generation alone has to look"),
        element("p", _CONTROL.format(documents=result["control_documents"])),
        table(HEAD, map(cells, control)),
    ]


def _bars(main: Sequence[MethodSummary], control: Sequence[MethodSummary]) -> bytes:
    """Return the bar chart: one group for each probe, an interval on each bar, the seeds as dots."""
    everything = [*main, *control]
    places = [index + 0.6 * (summary.method.role == "control") for index, summary in enumerate(everything)]
    with figure(11.5, 1.2 + 0.36 * len(everything)) as drawn:
        for axes, probe in zip(drawn.subplots(1, 2, sharey=True), ("linear", "knn"), strict=True):
            for place, summary in zip(places, everything, strict=True):
                value = getattr(summary, probe)
                axes.barh(place, 100 * value.mean, color=_colour(summary), alpha=0.85)
                axes.plot([100 * value.low, 100 * value.high], [place, place], color="#222222", linewidth=1.4)
                axes.plot([100 * v for v in value.values], [place] * len(value.values), "o", color="#222222", ms=3)
            chance = main[0].runs[0].result["chance"]
            axes.axvline(100 * chance, color="#888888", linestyle=":", linewidth=1)
            axes.set_title({"linear": "Linear probe", "knn": "20 nearest neighbours"}[probe], loc="left")
            axes.set_xlabel("held-out images classified correctly, %; dotted: chance")
            axes.set_xlim(0, 100)
            axes.set_yticks(places, [summary.method.title for summary in everything])
            axes.grid(True, axis="x")
            axes.set_axisbelow(True)
        axes.invert_yaxis()
        return picture(drawn)


def _colour(summary: MethodSummary) -> str:
    """Return the colour of a method: that of the main method with the same losses; references are grey."""
    if summary.method.role == "reference":
        return "#b5b5b5"
    mains = [method.name for method in METHODS if method.role == "main"]
    return PALETTE[next(place for place, name in enumerate(mains) if summary.method.name.startswith(name))]


def _legend(summaries: Sequence[MethodSummary]) -> Html:
    items = (
        element("li", element("span", style=f"background:{_colour(summary)}"), summary.method.title)
        for summary in summaries
    )
    return element("ul", *items)


def _curves(summary: MethodSummary) -> list[RunMetrics]:
    """Return what the runs of a method reported; nothing for references."""
    if summary.method.kind != "pretrain":
        return []
    return [read_metrics(run.folder, run.job.name) for run in summary.runs]


def _text_curves(main: Sequence[MethodSummary], control: Sequence[MethodSummary]) -> list[Html]:
    """Return the text loss on the main documents and on those of both controls, side by side."""
    groups = {
        "Text loss, main documents": main,
        "Text loss, images before sentences": [summary for summary in control if summary.method.documents == "main"],
        "Text loss, control documents": [summary for summary in control if summary.method.documents == "control"],
    }
    drawings = []
    for title, group in groups.items():
        trained = [summary for summary in group if summary.method.trains_text]
        if not trained:
            continue
        with figure(4.8, 3.2) as drawn:
            axes = drawn.subplots()
            for summary in trained:
                _draw(axes, _curves(summary), "loss/generation", _colour(summary))
            axes.set_title(title, loc="left")
            axes.set_ylabel("nats per token")
            axes.set_ylim(bottom=0)
            drawings.append(svg_image(picture(drawn), title))
    return drawings


def _monitor_curves(main: Sequence[MethodSummary]) -> list[Html]:
    drawings = []
    for metric, title, unit in MONITORS:
        with figure(4.8, 3.0) as drawn:
            axes = drawn.subplots()
            for summary in main:
                _draw(axes, _curves(summary), metric, _colour(summary))
            axes.set_title(title, loc="left")
            axes.set_ylabel(unit, fontsize=7.5)
            drawings.append(svg_image(picture(drawn), title))
    return drawings


def _draw(axes: Axes, runs: Sequence[RunMetrics], metric: str, colour: str) -> None:
    """Draw the mean over seeds of a metric, over images seen, and the range of the seeds."""
    from matplotlib.ticker import EngFormatter

    if not runs:
        return
    points = [run.points(metric, "images") for run in runs]
    reports = min(len(x) for x, _ in points)
    x = np.mean([x[:reports] for x, _ in points], axis=0)
    values = np.array([y[:reports] for _, y in points])
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes.plot(x, values.mean(axis=0), color=colour, linewidth=1.6)
    axes.set_xlabel("images seen")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True)
    axes.set_axisbelow(True)


def _intervals(main: Sequence[MethodSummary]) -> str:
    result, seeds = main[0].runs[0].result, len(main[0].runs)
    return (
        f"Mean over {seeds} seeds (weights, order of documents, crops). Interval: 95%, for another seed and other test "
        f"images: Student's t over the seeds and the binomial error of {result['test_images']:,} test images, added in "
        f"quadrature. Dots: seeds. Probes are fitted on {result['probe_images']:,} other labelled images. Text loss, "
        "spread and rank are means over the last tenth of the training reports."
    )


def _differences(summaries: Sequence[MethodSummary]) -> list[tuple[str, str]]:
    rows = []
    for summary in summaries:
        settings = [
            f"{section}.{name} = {value!r}"
            for section, fields in summary.method.settings.items()
            for name, value in fields.items()
        ]
        kind = {"pretrain": "", "supervised": "labels instead of text", "untrained": "no training"}
        documents = ["the control documents"] if summary.method.documents == "control" else []
        rows.append((summary.method.title, ", ".join(documents + settings) or kind[summary.method.kind] or "nothing"))
    return rows


def _versions(result: Mapping[str, Any], summaries: Sequence[MethodSummary]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in software_versions().items())
    device = summaries[0].runs[0].result["device"]
    return f"{versions}; device: {device}; {result['cpu_minutes']} CPU minutes"


def _settings(preset: Preset) -> str:
    """Return the preset as it was read."""
    lines = ["[experiment]"]
    lines += [f"{name} = {value!r}" for name, value in vars(preset.experiment).items()]
    for section, fields in preset.run.items():
        lines += ["", f"[{section}]", *(f"{name} = {value!r}" for name, value in fields.items())]
    return "\n".join(lines)


_INTRODUCTION = (
    "The same vision encoder is pre-trained with different objectives on the same documents, and sees the same number "
    "of images. Everything that the main documents say after an image they have said before it, so a language model "
    "need not look at the image to foretell the text. Then the encoder is frozen and scored on labelled images that "
    "no document shows. CLIP reads every image with its own sentence."
)
_TEXT_LOSS = (
    "Mean over seeds; shaded: from the lowest to the highest seed. On the main documents the text can be foretold "
    "without the image."
)
_CONTROL = (
    "Generation alone must learn where nothing but the image foretells the text; if it did not, its failure above "
    "might be a defect and no collapse. Pairs are the images and sentences of the main documents without the text "
    "around them, image first: only the image foretells the sentence. The control documents ({documents}) are whole "
    "ones that announce nothing."
)
_STYLE = """
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem }
li span { display: inline-block; width: 1.4rem; height: .3rem; margin-right: .5rem; vertical-align: middle }
pre { background: #fafafa; border: 1px solid #e2e2e2; border-radius: 8px; padding: .8rem; font-size: .85rem;
      overflow-x: auto }
h2 + img { max-width: 100% }
"""
