"""The last things that a run does when everything is saved: it says why it ends, and sees that it stays ended."""

from __future__ import annotations

import logging
import os

from lcl_megatron.checkpoint.folders import step_folder
from lcl_megatron.training import launcher
from lcl_megatron.training.ending import Ending, ExitStatus
from lcl_megatron.training.run import Run

logger = logging.getLogger(__name__)


def ending_of(run: Run, was_asked: bool) -> Ending:
    """Return how a run ends after the step it has done.

    Args:
        run: the run.
        was_asked: whether some rank was asked to stop, by signal or file.
    """
    config, step = run.config, run.progress.step
    reason = ""
    if step < config.training.train_iters:
        interval = f"--exit-interval {config.logging.exit_interval}"
        reason = (run.stop.reason or "a signal to another rank") if was_asked else interval
    return Ending(
        step=step,
        train_iters=config.training.train_iters,
        save=config.checkpoint.save,
        reason=reason,
        was_requested=was_asked,
    )


def conclude(run: Run, ending: Ending) -> None:
    """Say on rank 0 how the run ends, and leave together; collective over all ranks after a requested stop.

    With ``--max-restarts`` an agent would take the status of a run that was asked to stop for a crash and start the
    ranks again. So the first rank of each node tells its agent to end, unless the agent is ending already: what it was
    told, it has sent on to all its ranks. Nobody leaves before all agents have been told.
    """
    if run.engine.groups.rank == 0:
        run.stop.forget_stop_file()
        ending.write()
        checkpoint = step_folder(ending.save, ending.step)
        logger.info("%s", ending.describe(checkpoint if ending.save and checkpoint.is_dir() else ""))
    if ending.status is ExitStatus.STOPPED:
        is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        is_agent_ending = any(launcher.forwards(number) for number in run.stop.received)
        if is_first_of_node and launcher.would_restart() and not is_agent_ending:
            launcher.end_agent()
        run.engine.groups.barrier()
