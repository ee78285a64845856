"""Go through the rows of a step one by one, on one process, to find the row that spoilt it.

python tools/replay_step.py RUN/checkpoints --step 1234
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from lcl_megatron.training.replay import Precision, find_step, report


def main(
    save: Annotated[Path, tyro.conf.Positional],
    step: int,
    first_row: int | None = None,
    precision: Precision = "run",
    data_path: tuple[str, ...] = (),
) -> None:
    """Print losses, gradient norm and sources of every row of a step; the last line is a summary in JSON.

    Weights are those of the newest checkpoint that the step cannot have changed. Nothing is written.

    Args:
        save: Folder of the run's checkpoints (--save); skipped/ in it knows which rows a skipped step read.
        step: The step as in the reports, 1 for the first.
        first_row: Rows consumed before the step, where the global batch size has changed on the way.
        precision: Dtype of weights and activations; run = as in the run.
        data_path: Folders of the run's corpora, if they have moved.
    """
    try:
        summary = report(find_step(save, step, first_row, precision, data_path), print)
    except (OSError, ValueError) as error:
        sys.exit(f"replay_step: {error}")
    print(json.dumps(summary))


if __name__ == "__main__":
    tyro.cli(main)
