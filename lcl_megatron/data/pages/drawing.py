"""One look for all drawings on pages.

matplotlib is imported where something is drawn: a training process that draws nothing need not load it.
Figures are made without pyplot, which would keep them alive and may ask for a display.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#3566b8", "#d1701f", "#2e8b57", "#a8327d", "#7a6a00", "#4d4d4d")
"""Colours of things that are compared, in this order."""


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """Give an empty figure, in inches, in the style of all pages; draw and save it inside the block."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.family": ["DejaVu Sans"],
        "font.size": 9,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.labelcolor": "#444444",
        "xtick.color": "#666666",
        "ytick.color": "#666666",
        "grid.color": "#e6e6e6",
        "svg.hashsalt": "lcl_megatron",  # equal input, equal file
    }
    with matplotlib.rc_context(style):
        yield Figure(figsize=(width, height), layout="constrained")


def picture(drawn: Figure, kind: str = "svg") -> bytes:
    """Return a figure as a file without a date: equal drawings are equal files.

    Args:
        drawn: The figure.
        kind: ``svg``, ``png`` or ``pdf``.
    """
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"CreationDate": None} if kind == "pdf" else None
    drawn.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    return buffer.getvalue()
