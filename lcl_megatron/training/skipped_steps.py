"""What a skipped step had read: a file that names every document and image of it, written by rank 0 alone.

Which rows a step reads on every rank is a pure function of the plan, so nothing is asked of other ranks.
``tools/replay_step.py`` goes through the rows of such a step one by one.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcl_megatron.checkpoint.durable_files import replace_text
from lcl_megatron.data.collate import collate_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lcl_megatron.config import RunConfig
    from lcl_megatron.data.planning.mixture import RowSequence
    from lcl_megatron.data.planning.plan import Plan, StepPlan
    from lcl_megatron.data.planning.rows import PlannedRow
    from lcl_megatron.training.guard import Skip
    from lcl_megatron.training.run import Run

logger = logging.getLogger(__name__)

SKIPPED_FOLDER = "skipped"
"""Folder of ``checkpoint.save``, or else of ``logging.log_dir``."""


def skip_file(root: str | Path, step: int) -> Path:
    """Return the file of a skipped step, 1 for the first, in a folder of checkpoints or of logs."""
    return Path(root) / SKIPPED_FOLDER / f"step-{step:08d}.json"


def report_skip(run: Run, skip: Skip) -> None:
    """Say on rank 0 which step was skipped, why, and where its sources are listed; nothing on other ranks.

    Call it before ``run.progress`` counts the step. A file that cannot be written is a line in the log: no rank waits
    for it.
    """
    if run.engine.groups.rank != 0:
        return
    root = _root(run.config)
    listed = "set --save or --log-dir to have its sources listed"
    if root:
        path = skip_file(root, skip.step)
        plan = run.plan.step(skip.step - 1, run.progress.consumed_rows)
        try:
            replace_text(path, json.dumps(_record(run.plan, plan, skip), indent=1, allow_nan=False) + "\n")
            listed = f"its sources: {path}"
        except OSError as error:
            listed = f"its sources could not be listed: {error}"
    logger.warning("step %d skipped on all ranks: %s; %s", skip.step, skip.reason, listed)


def _root(config: RunConfig) -> str:
    """Return the folder below which skipped steps are listed; empty = there is none."""
    return config.checkpoint.save or config.logging.log_dir


def _record(plan: Plan, step: StepPlan, skip: Skip) -> dict[str, Any]:
    """Return what is written of a step."""
    norm = skip.grad_norm
    return {
        "step": skip.step,
        "reason": skip.reason,
        "grad_norm": norm if math.isfinite(norm) else str(norm),
        "consumed_rows": step.first_row,
        "data": plan.fingerprint,
        "micro_batches": [
            {
                "dp_rank": dp_rank,
                "micro_batch": number,
                "rows": row_sources(plan.sequence, rows),
            }
            for dp_rank in range(plan.data_parallel_size)
            for number, rows in enumerate(step.micro_batches(dp_rank))
        ],
    }


def row_sources(sequence: RowSequence, rows: Sequence[PlannedRow]) -> list[dict[str, Any]]:
    """Return what stands in each row: its number in the run's sequence, epoch, documents, and images with their keys.

    Args:
        sequence: the run's rows.
        rows: some of them.

    Returns:
        For each row ``row``, ``epoch``, ``documents`` (source file and line of each) and ``images`` (``key``, which
        seeds crop and drop-path, and ``source``).
    """
    collated = collate_rows(sequence, rows)
    owners = (collated.batch.image_slots // sequence.config.seq_length).tolist()
    keys = collated.batch.image_keys.tolist()
    images: list[list[dict[str, Any]]] = [[] for _ in rows]
    for owner, key, image in zip(owners, keys, collated.images.tolist(), strict=False):  # a blank slot has a key only
        images[owner].append({"key": key, "source": sequence.image_source(image)})
    return [
        {
            "row": row.index,
            "epoch": int(row.epoch),
            "documents": [sequence.document_source(row, number) for number in range(len(row.documents))],
            "images": shown,
        }
        for row, shown in zip(rows, images, strict=True)
    ]
