"""The drawings of a corpus's statistics page, and the sentence under each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lcl_megatron.config.run import DataConfig
from lcl_megatron.data.pages.corpus_statistics import (
    ASPECT_EDGES,
    SIDE_EDGES,
    SIMILARITY_EDGES,
    CorpusStatistics,
    ImageStatistics,
)
from lcl_megatron.data.pages.drawing import PALETTE, figure, picture
from lcl_megatron.data.pages.histogram import Histogram
from lcl_megatron.data.pages.page import Html, counted, element, svg_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (4.6, 2.9)
"""Inches of a drawing."""
FEW = 48
"""Histograms whose largest value is not above it are drawn with one bar per value."""
FAINT = "#c3d2ea"
"""Colour of what training leaves out."""
ROW_LENGTH = DataConfig.seq_length
"""Tokens of a row unless a run says otherwise: marked, so that long documents are seen as such."""
INPUT_SIDE = 224
"""Pixels of the usual encoder input: smaller images are enlarged."""


def document_drawings(statistics: CorpusStatistics) -> Iterator[Html]:
    """Yield the drawings about documents."""
    lengths = statistics.document_tokens
    long = share(lengths.total - lengths.below(ROW_LENGTH), lengths.total)
    yield _sources(statistics.source_documents)
    yield _histogram(
        "Document length", "text tokens", "documents", lengths, ROW_LENGTH, f"{long} have {ROW_LENGTH:,} or more."
    )
    segments = statistics.segment_tokens
    empty = share(segments.below(1), segments.total)
    yield _histogram("Segment length", "tokens", "text segments", segments, note=f"{empty} are empty.")
    images = statistics.document_images
    many = share(images.total - images.below(DataConfig.max_images_per_document + 1), images.total)
    yield _histogram(
        "Images per document",
        "images",
        "documents",
        images,
        note=f"{many} have more than {DataConfig.max_images_per_document}, of which an epoch shows a random choice.",
    )


def image_drawings(statistics: CorpusStatistics) -> Iterator[Html]:
    """Yield the drawings about images."""
    images = statistics.images
    yield _similarity(statistics)
    yield _sizes(images)
    small = share(images.short_side.below(INPUT_SIDE), images.short_side.total)
    yield _histogram(
        "Short side",
        "pixels",
        "images",
        images.short_side,
        INPUT_SIDE,
        f"{small} are below {INPUT_SIDE} pixels, and enlarged for an encoder of that size.",
    )
    yield _aspect(images)
    yield _histogram("Image file size", "bytes", "images", images.bytes)


def share(part: int, whole: int) -> str:
    """Return a share in percent; as ``0.01%`` where it is small and not nothing."""
    if not whole:
        return "0%"
    percent = 100 * part / whole
    return f"{percent:.2f}%" if 0 < percent < 1 or 99 < percent < 100 else f"{percent:.0f}%"


def _histogram(
    title: str, unit: str, things: str, histogram: Histogram, mark: int | None = None, note: str = ""
) -> Html:
    """Draw sizes: one bar per value if all are small, else on a logarithmic axis."""
    with figure(*SIZE) as drawn:
        axes = drawn.subplots()
        if histogram.max <= FEW:
            values = np.arange(histogram.max + 1)
            axes.bar(values, histogram.counts[: histogram.max + 1], width=0.85, color=PALETTE[0])
            axes.set_xlim(min(histogram.min, 1) - 0.7, max(histogram.max, 5) + 0.7)
            label = things
        else:
            edges = _log_edges(max(1, histogram.min), histogram.max + 1)
            height = histogram.between(edges) / np.log2(edges[1:] / edges[:-1])
            axes.stairs(height, edges, fill=True, color=PALETTE[0])
            axes.set_xscale("log")
            label = f"{things} per doubling"
            if mark is not None and edges[0] < mark < edges[-1]:
                _mark(axes, mark, f"{mark:,}")
        _finish(axes, title, unit, label)
        drawing = svg_image(picture(drawn), title)
    low, middle, high = (f"{histogram.quantile(q):,}" for q in (0.05, 0.5, 0.95))
    facts = f"Median {middle}, mean {number(histogram.mean)}; 90% lie in {low} to {high}; largest {histogram.max:,}."
    return _captioned(drawing, facts if histogram.total else "There are none.", note if histogram.total else "")


def _sources(documents: np.ndarray) -> Html:
    """Draw the documents of every source."""
    title = "Documents per source"
    with figure(*SIZE) as drawn:
        axes = drawn.subplots()
        if len(documents) <= FEW:
            axes.bar(np.arange(len(documents)), documents, width=0.85, color=PALETTE[0])
        else:
            axes.stairs(documents, np.arange(len(documents) + 1) - 0.5, fill=True, color=PALETTE[0])
        axes.set_xlim(-0.8, len(documents) - 0.2)
        _finish(axes, title, "number of the source", "documents")
        drawing = svg_image(picture(drawn), title)
    low, middle, high = np.quantile(documents, (0, 0.5, 1))
    return _captioned(
        drawing,
        f"{counted(len(documents), 'source')}, numbered in the order of the corpus: {low:,.0f} to {high:,.0f} "
        f"documents, median {middle:,.0f}.",
    )


def _similarity(statistics: CorpusStatistics) -> Html:
    """Draw the similarities; images that are too little similar for training are faint."""
    images, threshold = statistics.images, statistics.min_similarity
    title = "Similarity of image and text"
    with figure(*SIZE) as drawn:
        axes = drawn.subplots()
        low = SIMILARITY_EDGES[1:] <= threshold + 1e-9
        axes.stairs(np.where(low, images.similarity, 0), SIMILARITY_EDGES, fill=True, color=FAINT)
        axes.stairs(np.where(low, 0, images.similarity), SIMILARITY_EDGES, fill=True, color=PALETTE[0])
        shown = SIMILARITY_EDGES[np.flatnonzero(images.similarity)]
        axes.set_xlim(min(threshold, shown.min(initial=1)) - 0.05, max(threshold, shown.max(initial=0)) + 0.06)
        _mark(axes, threshold, f"{threshold:g}")
        _finish(axes, title, "CLIP similarity", "images", is_whole=False)
        drawing = svg_image(picture(drawn), title)
    total, documents = images.bytes.total, statistics.document_images.total
    one = f"{share(images.similarity_of_one, total)} are exactly 1, which is also written where a source gives none."
    return _captioned(
        drawing,
        f"{share(images.similar, total)} of the images reach {threshold:g} and may be shown in training; "
        f"{share(statistics.similar_documents, documents)} of the documents have such an image.",
        one if images.similarity_of_one else "",
    )


def _sizes(images: ImageStatistics) -> Html:
    """Draw width against height."""
    from matplotlib.colors import LogNorm

    title = "Image size"
    with figure(*SIZE) as drawn:
        axes = drawn.subplots()
        used = np.flatnonzero(images.sizes.any(axis=0) | images.sizes.any(axis=1))
        if len(used):
            first, end = max(0, used[0] - 1), min(len(images.sizes), used[-1] + 2)
            counts = np.ma.masked_equal(images.sizes[first:end, first:end].T, 0)
            edges, scale = SIDE_EDGES[first : end + 1], LogNorm(1, max(2, counts.max()))
            mesh = axes.pcolormesh(edges, edges, counts, norm=scale, cmap="viridis")
            drawn.colorbar(mesh, ax=axes, label="images")
        axes.set_aspect("equal")
        axes.set_title(title, loc="left")
        axes.set_xlabel("width, pixels")
        axes.set_ylabel("height, pixels")
        for axis, change in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            change("log", base=2)
            axis.set_major_formatter("{x:g}")
        drawing = svg_image(picture(drawn), title)
    known, unknown = images.short_side.total, images.unknown_size
    return _captioned(
        drawing,
        f"{known:,} images, by their files' headers; a field is a quarter of a doubling wide.",
        f"{unknown:,} have no known size." if unknown else "",
    )


def _aspect(images: ImageStatistics) -> Html:
    """Draw the images' shapes."""
    with figure(*SIZE) as drawn:
        axes = drawn.subplots()
        axes.stairs(images.aspect, ASPECT_EDGES, fill=True, color=PALETTE[0])
        axes.set_xscale("log")
        _finish(axes, "Aspect ratio", "width : height", "images")
        axes.set_xticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], ["1:8", "1:4", "1:2", "1:1", "2:1", "4:1", "8:1"])
        axes.minorticks_off()
        drawing = svg_image(picture(drawn), "Aspect ratio")
    extreme = share(images.extreme_aspect, images.short_side.total)
    return _captioned(drawing, f"{extreme} are longer than 3:1 or taller than 1:3; those beyond the ends count there.")


def _log_edges(first: int, end: int) -> np.ndarray:
    """Return ascending integers from ``first`` to at least ``end``, a quarter of a doubling apart or 1."""
    count = int(4 * np.log2(end / first)) + 2
    return np.unique(np.ceil(first * 2.0 ** (np.arange(count) / 4)).astype(np.int64))


def _mark(axes: Axes, value: float, text: str) -> None:
    """Draw a named dashed line at a value."""
    axes.axvline(value, color=PALETTE[1], linewidth=1.2, linestyle="--")
    axes.annotate(
        text,
        (value, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        color=PALETTE[1],
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
    )


def _finish(axes: Axes, title: str, x: str, y: str, is_whole: bool = True) -> None:
    """Label a drawing of counts; whole numbers to the right or, like similarities, not."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_xscale() == "log":
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=is_whole, min_n_ticks=1))
    axes.set_ylim(0, max(1, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if is_whole:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, axis="y")
    axes.set_axisbelow(True)


def _captioned(drawing: Html, *sentences: str) -> Html:
    return element("figure", drawing, element("figcaption", " ".join(filter(None, sentences))))


def number(value: float) -> str:
    """Return a number with three digits, or in full where it has more before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
