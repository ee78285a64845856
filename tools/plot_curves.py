"""Draw the curves of one or several runs: ``python tools/plot_curves.py RUN/logs... --output curves.html``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lcl_megatron.training.curves import write_curves


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    output: Path = Path("curves.html"),
    names: tuple[str, ...] = (),
    x_axis: Literal["step", "images"] = "step",
) -> None:
    """Draw losses, retrieval, feature health, optimizer and throughput of one or several runs.

    Args:
        runs: Log folders of runs, or metrics.jsonl files.
        output: File to write; .html = page with a table of final values, .png .pdf .svg = one picture.
        names: Names of the runs, in the same order; default = names of their folders.
        x_axis: Draw over optimizer steps or over images consumed.
    """
    try:
        write_curves(runs, output, names, x_axis)
    except (OSError, ValueError) as error:
        sys.exit(f"plot_curves: {error}")
    print(f"wrote {output}")


if __name__ == "__main__":
    tyro.cli(main)
