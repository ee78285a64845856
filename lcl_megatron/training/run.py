"""One run in memory: everything that setup builds and the loop uses."""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.checkpoint.folders import Progress
from lcl_megatron.checkpoint.native import Trainable
from lcl_megatron.checkpoint.saver import Saver
from lcl_megatron.config import RunConfig
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.parallel.agreement import StepFlags
from lcl_megatron.parallel.engine import Engine
from lcl_megatron.training.guard import Guard
from lcl_megatron.training.ledger import Ledger
from lcl_megatron.training.metrics_logger import MetricsLogger
from lcl_megatron.training.stop import StopSignal
from lcl_megatron.training.watchdog import Watchdog


@dataclass
class Run:
    """A run between its steps. Only ``progress`` is replaced."""

    config: RunConfig
    """Resolved configuration."""
    trainable: Trainable
    """Model, optimizer, schedule."""
    plan: Plan
    """The order of the rows."""
    loader: StepLoader
    """Yields this rank's part of each global batch."""
    logger: MetricsLogger
    """Writes reports on rank 0."""
    guard: Guard
    """Decides which steps are taken."""
    stop: StopSignal
    """Whether this rank was asked to stop."""
    watchdog: Watchdog
    """Is told what the loop does, and speaks up when that takes too long."""
    progress: Progress
    """How far the run has come."""
    saver: Saver | None
    """Writes checkpoints; None = the run has no place for them."""
    ledger: Ledger | None = None
    """Records the rows of every step; None = no ledger is kept, or another rank records the same rows."""

    @property
    def engine(self) -> Engine:
        """This rank's part of the model."""
        return self.trainable.engine

    def close(self) -> None:
        """Close its files and end the processes beside it; a checkpoint that is not complete is lost."""
        self.logger.close()
        if self.saver is not None:
            self.saver.close()
        if self.ledger is not None:
            self.ledger.close()

    def flags(self) -> StepFlags:
        """Return what this rank tells all others at the next step."""
        writing, failed = self.saver.poll() if self.saver is not None else (False, False)
        return StepFlags(stop=self.stop.requested, writing=writing, write_failed=failed)
