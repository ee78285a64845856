"""Going through a step again, row by row, to find out which row made its gradient infinite, no number, or large.

One process holds the whole model, whatever the layout of the run. Every row is trained on alone, without an update:

- its generation loss is the mean over its targets;
- its contrastive loss is that of its own images with each other. What a row adds to a contrast with rows of other ranks
  cannot be told apart: one bad feature spoils the loss of all pairs;
- its gradient is the row's share of the step's gradient, each loss weighted with the row's part of the step's targets
  and pairs. Images that cannot be decoded are counted among the step's pairs.

Images are cropped and layers dropped as in the run, by step and image. Weights are those of a checkpoint, so a fault
that only later weights show is not reproduced unless the checkpoint is of the step before.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.folders import complete_checkpoints, read_config, step_of
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.reader import CheckpointReader
from lcl_megatron.config import ParallelConfig, RunConfig
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.planning.mixture import fingerprint_of
from lcl_megatron.parallel import engine as engines
from lcl_megatron.parallel.agreement import agree
from lcl_megatron.training.objective import Objective
from lcl_megatron.training.setup import build_plan, open_corpora, with_vocabulary
from lcl_megatron.training.skipped_steps import row_sources, skip_file

if TYPE_CHECKING:
    from lcl_megatron.data.batch import StepBatch, StepLayout
    from lcl_megatron.parallel.agreement import AgreedStep
    from lcl_megatron.parallel.engine import Engine

Precision = Literal["run", "fp32", "bf16"]
"""Dtype of parameters and activations: the run's, or another."""


@dataclass(frozen=True)
class ReplayedStep:
    """What is replayed, and with which weights."""

    step: int
    """Number of the step as in the reports, 1 for the first."""
    checkpoint: Path
    """Holds the weights."""
    first_row: int
    """Rows consumed before the step."""
    first_row_from: str
    """How that is known."""
    config: RunConfig
    """The run, on one process."""
    data: str = ""
    """Fingerprint of the sequence of rows that the step was read from; empty = not known."""


@dataclass(frozen=True)
class ReplayedRow:
    """What a row gives."""

    generation_loss: float
    """Mean over the row's targets; 0 without targets."""
    contrastive_loss: float
    """Mean over the row's pairs, contrasted with each other; 0 without pairs."""
    grad_norm: float
    """Norm of the row's share of the step's gradient."""
    sources: dict[str, Any]
    """Number, epoch, documents and images (see ``skipped_steps.row_sources``)."""
    bad_images: tuple[str, ...]
    """Images that could not be decoded."""

    @property
    def is_finite(self) -> bool:
        """Whether losses and gradient are."""
        return all(map(math.isfinite, (self.generation_loss, self.contrastive_loss, self.grad_norm)))


def find_step(
    save: Path,
    step: int,
    first_row: int | None = None,
    precision: Precision = "run",
    data_path: tuple[str, ...] = (),
) -> ReplayedStep:
    """Find the weights and the rows of a step.

    Args:
        save: the run's ``checkpoint.save``.
        step: number of the step, 1 for the first.
        first_row: rows consumed before it; None = as the file of the skipped step says, else those consumed before the
            checkpoint, and the global batch size for each step from there.
        precision: dtype of parameters and activations.
        data_path: folders of the corpora; empty = where the run had them.

    Raises:
        CheckpointError: there is no checkpoint of an earlier step, or it is damaged.
        ValueError: the file of the skipped step is damaged.
    """
    record = _record(save, step)
    checkpoint = _checkpoint(save, step, is_skipped=record is not None)
    config = read_config(checkpoint)
    training = config.training
    config = dataclasses.replace(
        config,
        parallel=ParallelConfig(use_distributed_optimizer=False, overlap_grad_reduce=False),
        training=dataclasses.replace(
            training, micro_batch_size=1, precision=training.precision if precision == "run" else precision
        ),
        data=dataclasses.replace(config.data, data_path=data_path or config.data.data_path),
    )
    source, data = "as given", record["data"] if record else ""
    if first_row is None and record is not None:
        first_row, source = int(record["consumed_rows"]), str(skip_file(save, step))
    elif first_row is None:
        progress = CheckpointReader(checkpoint).progress()
        behind = step - 1 - progress.step
        first_row = progress.consumed_rows + behind * training.global_batch_size
        source = (
            f"{progress.consumed_rows} before {checkpoint.name}, {behind} steps of {training.global_batch_size} rows"
        )
        # The corpora, which may have been named anew, must be those of the checkpoint.
        data = fingerprint_of(progress.data) if progress.data else ""
    return ReplayedStep(step, checkpoint, first_row, source, config, data)


def _record(save: Path, step: int) -> dict[str, Any] | None:
    """Return what was written of the step when it was skipped; None if it was not, or its file is not there."""
    path = skip_file(save, step)
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        int(record["consumed_rows"]), str(record["data"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not the record of a skipped step ({error!r}); remove it, and give --first-row"
        ) from error
    return record


def _checkpoint(save: Path, step: int, is_skipped: bool) -> Path:
    """Return the newest checkpoint that the step cannot have changed."""
    # A step that was skipped left its weights as they were.
    last = step if is_skipped else step - 1
    found = {step_of(checkpoint): checkpoint for checkpoint in reversed(complete_checkpoints(save))}
    early = [number for number in found if number <= last]
    if not early:
        raise CheckpointError(
            f"{save} holds no checkpoint of a step before {step} (steps found: {list(found) or 'none'}); give the "
            "--save folder of the run, and a later --step"
        )
    return found[early[-1]]


def replay(found: ReplayedStep) -> Iterator[ReplayedRow]:
    """Yield what each row of a step gives, in the order of the run's sequence of rows.

    Raises:
        CheckpointError: the checkpoint is damaged, or the step was read from other data.
        ConfigError, CorpusError: the run's data are not there or not readable.
    """
    corpora = open_corpora(found.config)
    config = with_vocabulary(found.config, corpora)
    rows = config.training.global_batch_size
    whole_plan = build_plan(config, corpora, dp_size=1)
    if found.data not in ("", whole_plan.fingerprint):
        raise CheckpointError(
            f"step {found.step} was read from other data (fingerprint {found.data}) than those of {found.checkpoint} "
            f"in {' '.join(config.data.data_path)} ({whole_plan.fingerprint}): its rows would be others; give the "
            "run's corpora with --data-path"
        )
    whole = whole_plan.step(found.step - 1, found.first_row).layout
    # A plan whose every "step" is one row.
    plan = build_plan(
        dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=1)),
        corpora,
        dp_size=1,
    )
    loader = StepLoader(plan, 0, config.vision.image_size, consumed_rows=found.first_row, end_step=rows)
    groups = engines.start(config)
    try:
        engine = engines.build_engine(config, groups)
        native.load_model(found.checkpoint, engine)
        for batch in loader:
            generation, contrastive, norm = _train_on_row(engine, batch, whole, found.step - 1)
            planned = plan.step(batch.step, found.first_row + batch.step).micro_batches(0)[0]
            (sources,) = row_sources(plan.sequence, planned)
            yield ReplayedRow(generation, contrastive, norm, sources, batch.bad_images)
    finally:
        groups.destroy()


def _train_on_row(engine: Engine, batch: StepBatch, whole: StepLayout, step: int) -> tuple[float, float, float]:
    """Return generation loss, contrastive loss and gradient norm of one row of a step with the counts ``whole``."""
    own = agree(batch, engine.groups)
    part = _as_part(own, whole)
    engine.zero_gradients()
    objective = Objective(engine.config.loss, part, engine.groups)
    (losses,) = engine.forward_backward(part.micro_batches, objective, step)
    gradients = [p.main_grad.norm() for model in engine.models for p in model.parameters()]
    return (
        float(losses.generation_loss) * max(1, part.layout.num_targets) / max(1, own.layout.num_targets),
        float(losses.contrastive_loss) * max(1, part.num_pairs) / max(1, own.num_pairs),
        float(torch.stack(gradients).norm()),
    )


def _as_part(own: AgreedStep, whole: StepLayout) -> AgreedStep:
    """Return a step of one row whose losses are divided by the counts of the whole step that it is a part of."""
    # The pairs of the other rows are counted behind the row's own, where no slot of a micro-batch refers to them.
    others = np.ones(int(whole.has_context.sum()) - int(own.layout.has_context.sum()), dtype=bool)
    layout = dataclasses.replace(
        own.layout,
        num_targets=whole.num_targets,
        has_context=np.concatenate([own.layout.has_context, others]),
    )
    return dataclasses.replace(own, layout=layout, image_ok=np.concatenate([own.image_ok, others]))


def report(found: ReplayedStep, say: Callable[[str], None]) -> dict[str, Any]:
    """Replay a step and say what each row gives.

    Args:
        found: the step.
        say: takes a line at a time.

    Returns:
        ``step``, ``checkpoint``, ``rows``, ``non_finite_rows`` (numbers in the run's sequence of rows) and
        ``largest_grad_norm`` (of the finite rows; None if there are none).
    """
    say(
        f"step {found.step}: {found.config.training.global_batch_size} rows from row {found.first_row} "
        f"({found.first_row_from}), in {found.config.training.precision}, with the weights of {found.checkpoint}"
    )
    rows, bad, largest = 0, [], None
    for row in replay(found):
        rows += 1
        for line in _describe(row):
            say(line)
        if not row.is_finite:
            bad.append(int(row.sources["row"]))
        elif largest is None or row.grad_norm > largest:
            largest = row.grad_norm
    return {
        "step": found.step,
        "checkpoint": str(found.checkpoint),
        "rows": rows,
        "non_finite_rows": bad,
        "largest_grad_norm": largest,
    }


def _describe(row: ReplayedRow) -> Iterator[str]:
    """Yield a row's lines: numbers and documents; of one that is not finite also its images; undecodable ones."""
    figures = f"gen {row.generation_loss:8.4f} | con {row.contrastive_loss:8.4f} | grad {row.grad_norm:10.4g}"
    flag = "" if row.is_finite else " | NOT FINITE"
    documents = ", ".join(row.sources["documents"])
    yield f"row {row.sources['row']} | {figures}{flag} | {len(row.sources['images'])} images | {documents}"
    for image in () if row.is_finite else row.sources["images"]:
        yield f"    key {image['key']}: {image['source']}"
    for reason in row.bad_images:
        yield f"    not decoded: {reason}"
