"""Score a checkpoint's frozen encoder with a kNN and a linear probe, beside the untrained encoder.

python tools/probe.py RUN/checkpoints --labels labels.csv --image-root images --output RUN/probe.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from lcl_megatron.evaluation.checkpoint_encoder import probe_checkpoint
from lcl_megatron.evaluation.probes import markdown_table, write_reports


def main(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    labels: Path,
    image_root: Path,
    train_split: str = "probe_train",
    test_split: str = "test",
    output: Path | None = None,
) -> None:
    """Score the newest checkpoint.

    Args:
        checkpoint: Folder of checkpoints, or one checkpoint.
        labels: CSV file with the columns image_name, split, label.
        image_root: Folder of the images.
        train_split: Images that the probes are fitted on.
        test_split: Images that are scored.
        output: JSON file to write.
    """
    try:
        reports = probe_checkpoint(checkpoint, labels, image_root, (train_split, test_split))
    except (OSError, ValueError) as error:
        sys.exit(f"probe: {error}")
    print(markdown_table(reports))
    if output is not None:
        write_reports(reports, output)


if __name__ == "__main__":
    tyro.cli(main)
