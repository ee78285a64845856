"""The training loop."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lcl_megatron.checkpoint import native
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.training.bad_images import BadImageWatch, TooManyBadImagesError
from lcl_megatron.training.curves import write_curves
from lcl_megatron.training.meter import Meter
from lcl_megatron.training.metrics_logger import METRICS_FILE
from lcl_megatron.training.run import Run
from lcl_megatron.training.step import StepResult, train_step

logger = logging.getLogger(__name__)


def train(run: Run) -> None:
    """Train until ``train_iters``; report and save on their intervals, and save when asked to stop.

    Raises:
        TooManyBadImagesError: the corpus's images can not be trusted; a checkpoint is written first.
        NonFiniteError: the gradient is not finite; nothing is written, because the weights are lost.
    """
    config = run.config
    meter = Meter(run)
    watch = BadImageWatch(config.data.max_bad_image_rate)
    run.watchdog.mark("data", run.progress.step + 1)
    waiting_since = time.perf_counter()
    for batch in run.loader:
        data_wait_s = time.perf_counter() - waiting_since
        result = train_step(run, batch)
        run.progress = native.Progress(
            step=batch.step + 1,
            consumed_rows=run.progress.consumed_rows + config.training.global_batch_size,
            consumed_images=run.progress.consumed_images + int(batch.layout.num_images.sum()),
            data=run.progress.data,
        )
        _watch(run, watch, result, batch)
        meter.add(result, batch, data_wait_s)

        step, last = run.progress.step, run.progress.step == config.training.train_iters
        stop = result.agreed.word.stop or (config.logging.exit_interval and step % config.logging.exit_interval == 0)
        if step % config.logging.log_interval == 0 or last or stop:
            run.watchdog.mark("report")
            run.logger.log(step, meter.report(watch.total))
        if step % config.checkpoint.save_interval == 0 or last or stop:
            save_checkpoint(run)
        run.logger.progress(step)
        if stop:
            break
        run.watchdog.mark("data", step + 1)
        waiting_since = time.perf_counter()
    run.watchdog.mark("report")
    _draw_curves(run)


def _watch(run: Run, watch: BadImageWatch, result: StepResult, batch: StepBatch) -> None:
    """Count the step's bad images; save before giving up, so that the run can go on from here."""
    try:
        watch.add(result.agreed, batch.bad_images)
    except TooManyBadImagesError:
        save_checkpoint(run)
        raise


def _draw_curves(run: Run) -> None:
    """Write the page of curves beside the metrics, on the process that writes, if there are any metrics."""
    if run.config.logging.log_dir and run.engine.groups.rank == 0:
        log_dir = Path(run.config.logging.log_dir)
        if (log_dir / METRICS_FILE).stat().st_size > 0:
            write_curves([log_dir], log_dir / "curves.html")


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint of the run as it is, if the run has a place for them; collective over all ranks."""
    if not run.config.checkpoint.save:
        return
    run.watchdog.mark("save")
    tokenizer = run.plan.sequence.sources[0].corpus.tokenizer.model
    with run.engine.whole_parameters():
        folder = native.save(run.config.checkpoint.save, run.trainable, run.progress, tokenizer)
    if run.engine.groups.rank == 0:
        logger.info("saved %s", folder)
