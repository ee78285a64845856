"""The training loop."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.parallel.parameter_hash import compare_replicas
from lcl_megatron.training.bad_images import BadImageWatch, TooManyBadImagesError
from lcl_megatron.training.conclusion import conclude, ending_of
from lcl_megatron.training.curves import write_curves
from lcl_megatron.training.ending import Ending
from lcl_megatron.training.meter import Meter
from lcl_megatron.training.metrics_logger import METRICS_FILE
from lcl_megatron.training.run import Run
from lcl_megatron.training.step import NonFiniteError, train_step

logger = logging.getLogger(__name__)


def train(run: Run) -> Ending:
    """Train until ``train_iters``; report and save on their intervals, and save when asked to stop.

    Raises:
        TooManyBadImagesError: the corpus's images can not be trusted; a checkpoint is written first.
        NonFiniteError: too many steps in a row were skipped, or weights are not finite; nothing is written.
        ReplicaMismatchError: replicas hold different weights; nothing is written.
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
    watch = BadImageWatch(config.data.max_bad_image_rate)
    was_asked = False
    run.watchdog.mark("data", run.progress.step + 1)
    waiting_since = time.perf_counter()
    for batch in run.loader:
        data_wait_s = time.perf_counter() - waiting_since
        result = train_step(run, batch)
        if run.ledger is not None:  # before any checkpoint of this step, so that none holds rows that are not recorded
            run.ledger.record(batch, skipped=result.skip is not None)
        if run.saver is not None:
            run.saver.advance(result.agreed.word.writing, result.agreed.word.write_failed)
        run.progress = native.Progress(
            step=batch.step + 1,
            consumed_rows=run.progress.consumed_rows + config.training.global_batch_size,
            consumed_images=run.progress.consumed_images + int(batch.layout.num_images.sum()),
            data=run.progress.data,
        )
        watch.add(result.agreed, batch.bad_images)
        _compare_replicas(run)
        meter.add(result, batch, data_wait_s)

        step, last = run.progress.step, run.progress.step == config.training.train_iters
        was_asked = result.agreed.word.stop
        stop = was_asked or (config.logging.exit_interval and step % config.logging.exit_interval == 0)
        if step % config.logging.log_interval == 0 or last or stop:
            run.watchdog.mark("report")
            run.logger.log(step, meter.report(watch.total))
        # While steps are skipped the weights may be why, finite but too large: no moment to replace a good checkpoint.
        if (step % config.checkpoint.save_interval == 0 and not result.skip) or last or stop:
            save_checkpoint(run)
        run.logger.progress(step)
        if stop:
            break
        run.watchdog.mark("data", step + 1)
        waiting_since = time.perf_counter()
    return was_asked


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
    step, interval = run.progress.step, run.config.guard.compare_replicas_interval
    if interval and step % interval == 0:
        compare_replicas(run.engine, step, run.guard.replicas_agreed_step)
        run.guard.replicas_agreed_step = step


def _draw_curves(run: Run) -> None:
    """Write the page of curves beside the metrics, on the process that writes, if there are any metrics."""
    if run.config.logging.log_dir and run.engine.groups.rank == 0:
        log_dir = Path(run.config.logging.log_dir)
        if (log_dir / METRICS_FILE).stat().st_size > 0:
            write_curves([log_dir], log_dir / "curves.html")


def save_checkpoint(run: Run) -> None:
    """Begin to write a checkpoint of the run as it is, if the run has a place for them; collective over all ranks.

    Without ``checkpoint.async_save``, wait until it is complete.
    """
    if run.saver is None:
        return
    run.watchdog.mark("save")
    tokenizer = run.plan.sequence.sources[0].corpus.tokenizer.model
    with run.engine.whole_parameters():
        run.saver.begin(run.progress.step, lambda: native.images(run.trainable, run.progress, tokenizer))
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
