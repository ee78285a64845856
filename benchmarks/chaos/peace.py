"""The run that nobody disturbs, which all others must equal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.launcher import EventReader, Launch
from benchmarks.chaos.processes import wait_until_alone
from benchmarks.chaos.stored import newest_step
from benchmarks.chaos.timeline import Rows, rows_of

STUCK_S = 90.0
"""No small run lasts so long, also on a busy machine."""


@dataclass(frozen=True)
class Undisturbed:
    """A run in peace."""

    save: Path
    """Its checkpoints."""
    rows: Rows
    """Digests of the rows of each (rank, step)."""
    start_s: float
    """Seconds from the start of the ranks to the first step."""
    step_s: float
    """Seconds of a step."""


def undisturbed(run: Launch) -> Undisturbed:
    """Train in peace.

    Args:
        run: what is trained; its checkpoints are all kept.

    Raises:
        RuntimeError: even that fails.
    """
    run.start()
    left = wait_until_alone(STUCK_S)
    events = EventReader(run.events).read()
    save, steps = Path(run.config.checkpoint.save), run.config.training.train_iters
    times = {what: [event["time"] for event in events if event["what"] == what] for what in ("start", "step")}
    if left or len(times["start"]) != 1 or newest_step(save) != steps:
        raise RuntimeError(f"a run that nobody disturbs fails:\n{run.log.read_text(encoding='utf-8')}")
    begin, end = times["step"][0], times["step"][-1]
    return Undisturbed(save, rows_of(events), begin - times["start"][0], (end - begin) / (steps - 1))
