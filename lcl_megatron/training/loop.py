"""The training loop."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel.parameter_hash import compare_replicas
from lcl_megatron.training.bad_images import BadImageWatch, TooManyBadImagesError
from lcl_megatron.training.conclusion import conclude, ending_of
from lcl_megatron.training.curves import write_curves
from lcl_megatron.training.ending import Ending
from lcl_megatron.training.meter import Meter
from lcl_megatron.training.metrics_logger import METRICS_FILE
from lcl_megatron.training.run import Run
from lcl_megatron.training.step import NonFiniteError, StepResult, train_step

logger = logging.getLogger(__name__)


def train(run: Run) -> Ending:
    """Train until ``train_iters``; report and save on their intervals, and save when asked to stop.

    Raises:
        TooManyBadImagesError: the corpus's images can not be trusted; a checkpoint is written first.
        NonFiniteError: too many steps in a row were skipped, or weights are not finite; nothing is written.
        ReplicaMismatchError: replicas hold different weights; nothing is written.
        SaveError: a checkpoint could not be written: any where ``checkpoint.on_save_error`` is ``stop``, else the last.
    """
    try:
        was_asked = _train(run)
    except (NonFiniteError, TooManyBadImagesError) as error:
        _save_before_giving_up(run, as_it_is=isinstance(error, TooManyBadImagesError))
        raise
    _finish_saving(run)
    ending = ending_of(run, was_asked)
    run.stop.leave(ending.status)
    run.watchdog.mark("report")
    _draw_curves(run)
    conclude(run, ending)
    return ending


def _train(run: Run) -> bool:
    """Train, report, begin checkpoints; return whether the run was asked to stop."""
    config = run.config
    meter = Meter(run)
    bad_images = BadImageWatch(config.data.max_bad_image_rate)
    was_asked = False
    run.watchdog.mark("data", run.progress.step + 1)
    waiting_since = time.perf_counter()
    for batch in run.loader:
        data_wait_s = time.perf_counter() - waiting_since
        result = train_step(run, batch)
        _count_step(run, result, batch)
        bad_images.add(result.agreed, batch.bad_images)
        _compare_replicas(run)
        meter.add(result, batch, data_wait_s)

        step, last = run.progress.step, run.progress.step == config.training.train_iters
        was_asked = result.agreed.flags.stop
        stop = was_asked or _is_due(step, config.logging.exit_interval)
        if _is_due(step, config.logging.log_interval) or last or stop:
            run.watchdog.mark("report")
            run.logger.log(step, meter.report(bad_images.total))
        # While steps are skipped the weights may be why, finite but too large: no moment to replace a good checkpoint.
        if (_is_due(step, config.checkpoint.save_interval) and result.skip is None) or last or stop:
            save_checkpoint(run)
        run.logger.progress(step)
        if stop:
            break
        run.watchdog.mark("data", step + 1)
        waiting_since = time.perf_counter()
    return was_asked


def _is_due(step: int, interval: int) -> bool:
    """Return whether something happens after a step that happens every ``interval`` steps; 0 = never."""
    return interval > 0 and step % interval == 0


def _count_step(run: Run, result: StepResult, batch: StepBatch) -> None:
    """Count a step that is done, and let the checkpoint that is being written get on."""
    # Before any checkpoint of this step, so that none holds rows that are not recorded.
    if run.ledger is not None:
        run.ledger.record(batch, skipped=result.skip is not None)
    if run.saver is not None:
        run.saver.advance(result.agreed.flags.writing, result.agreed.flags.write_failed)
    run.progress = dataclasses.replace(
        run.progress,
        step=batch.step + 1,
        consumed_rows=run.progress.consumed_rows + run.config.training.global_batch_size,
        consumed_images=run.progress.consumed_images + int(batch.layout.num_images.sum()),
    )


def _save_before_giving_up(run: Run, as_it_is: bool) -> None:
    """Complete the checkpoint that was begun before an error that all ranks raise together; collective over all ranks.

    One that cannot be written is a line in the log: the error, and its exit status, say why the run ends.

    Args:
        run: the run.
        as_it_is: begin another first: the run can go on from here.
    """
    try:
        if as_it_is:
            save_checkpoint(run)
        _finish_saving(run)
    except CheckpointError as error:
        if run.engine.groups.rank == 0:
            logger.error("%s", error)


def _compare_replicas(run: Run) -> None:
    """Compare the weights of replicas when it is time to; collective over all ranks."""
    step = run.progress.step
    if _is_due(step, run.config.guard.compare_replicas_interval):
        compare_replicas(run.engine, step, run.guard.replicas_agreed_step)
        run.guard.replicas_agreed_step = step


def save_checkpoint(run: Run) -> None:
    """Begin to write a checkpoint of the run as it is, if the run has a place for them; collective over all ranks.

    Without ``checkpoint.async_save``, wait until it is complete.
    """
    if run.saver is None:
        return
    run.watchdog.mark("save")
    tokenizer = run.plan.sequence.sources[0].corpus.tokenizer.model
    with run.engine.whole_parameters():
        run.saver.begin(run.progress.step, lambda: native.files(run.trainable, run.progress, tokenizer))
    if not run.config.checkpoint.async_save:
        run.saver.finish()


def _finish_saving(run: Run) -> None:
    """Wait until the last checkpoint is complete; collective over all ranks.

    Raises:
        SaveError: it could not be written.
    """
    if run.saver is not None:
        run.watchdog.mark("save")
        run.saver.finish()
        run.saver.require_success()


def _draw_curves(run: Run) -> None:
    """Write the page of curves beside the metrics, on the process that writes, if there are any metrics."""
    if run.config.logging.log_dir and run.engine.groups.rank == 0:
        log_dir = Path(run.config.logging.log_dir)
        if (log_dir / METRICS_FILE).stat().st_size > 0:
            write_curves([log_dir], log_dir / "curves.html")
