"""How a run ends: the exit statuses of a rank, and the file that tells a job script whether the run is finished.

The statuses of the ranks do not come through ``torchrun``, which itself ends with 1 whatever they were; so rank 0
leaves ``outcome.json`` in the folder of the checkpoints. It needs nothing but the standard library.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from lcl_megatron.checkpoint.durable_files import replace_text

OUTCOME_FILE = "outcome.json"
"""File of a ``checkpoint.save`` folder; absent while a run goes on and after one that failed or was killed."""


class ExitStatus(IntEnum):
    """What a rank tells its launcher. From 75 on, whoever starts jobs can act on it without reading a log."""

    FINISHED = 0
    """Trained to ``train_iters``, or to ``exit_interval``."""
    CRASHED = 1
    """An error that nobody foresaw; its traceback is on standard error."""
    USAGE = 2
    """The command line or the configuration cannot work: change it."""
    STOPPED = 75
    """Stopped because it was asked to (EX_TEMPFAIL): start the same command again."""
    NUMBERS = 76
    """Loss, gradient or weights went wrong: go on from a checkpoint with other settings."""
    DATA = 77
    """The corpus cannot be read, or too many of its images cannot be decoded."""
    CHECKPOINT = 79
    """A checkpoint cannot be loaded or written."""
    FOLDER_HELD = 80
    """Another run writes into the same folder."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Where a run has ended, and why."""

    step: int
    """Optimizer steps done."""
    train_iters: int
    """Optimizer steps of the whole run."""
    save: str = ""
    """Folder of checkpoints; empty = none are kept."""
    reason: str = ""
    """Who asked it to stop before the end: ``SIGTERM``, ``--exit-interval 500``."""
    was_requested: bool = False
    """Whether somebody outside asked; False where ``exit_interval`` did."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.step >= self.train_iters

    @property
    def status(self) -> ExitStatus:
        """Exit status of every rank. A stop that comes with the last step leaves a finished run."""
        return ExitStatus.STOPPED if self.was_requested and not self.is_finished else ExitStatus.FINISHED

    def describe(self, checkpoint: str | Path = "") -> str:
        """Return the last line of a run's log.

        Args:
            checkpoint: where the state of this step has been saved; empty = nowhere.
        """
        if self.is_finished:
            return f"finished at step {self.step} of {self.train_iters}" + (
                f"; saved {checkpoint}" if checkpoint else ""
            )
        stopped = f"stopped by {self.reason} at step {self.step} of {self.train_iters}"
        if not checkpoint:
            return f"{stopped}; nothing is saved without --save: the same command would begin anew"
        return f"{stopped}; saved {checkpoint}; start the same command again to go on"

    def write(self) -> None:
        """Leave ``outcome.json`` in the folder of checkpoints, if there is one; it is there whole or not at all."""
        if not self.save:
            return
        fields = {"outcome": "finished" if self.is_finished else "stopped", **asdict(self), "status": self.status.value}
        replace_text(Path(self.save) / OUTCOME_FILE, json.dumps(fields) + "\n")
