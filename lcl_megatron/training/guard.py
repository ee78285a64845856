"""Which steps are taken: a gradient that is not finite, or far out of line, changes no weight.

The gradient norm decides, because all ranks know it before the update, and know the same one
(``parallel/gradient_norm.py``). Losses that are not finite show in it too (``training/objective.py``). A spike is
looked for in the norm and not in the loss: only the last stage knows the loss, so a decision by it would cost every
step a collective and a wait for the device. A batch that makes the loss jump makes the gradient jump.

A spike is a norm far above the median of the last steps that were taken, in units of their median absolute deviation
(MAD). Both resist outliers, and norms of skipped steps are never among them: a mean and a variance into which one
infinite value has gone would skip every step for as long as it stays in the window.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcl_megatron.config import GuardConfig

LEAST_DEVIATION = 0.01
"""The MAD counts as at least this share of the median: norms that hardly differ make no spike of the next one."""
NAMED_STEPS = 10
"""So many of the skipped steps are named in an error."""


@dataclass(frozen=True)
class Skip:
    """A step that was not taken."""

    step: int
    """Its number as in the reports, 1 for the first."""
    grad_norm: float
    """Global gradient norm."""
    reason: str
    """Why, e.g. ``gradient norm nan``."""

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


class Guard:
    """Judges gradient norms; the same on all ranks, and after a restart the same as without one."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.skipped_steps = 0
        """Steps skipped since the start of the run."""
        self.in_a_row: list[Skip] = []
        """The skipped steps behind the last one that was taken."""
        self.replicas_agreed_step = 0
        """Step behind which the replicas' weights were last compared and equal; 0 = never."""
        self._window: deque[float] = deque(maxlen=config.spike_window)

    def judge(self, step: int, grad_norm: float) -> Skip | None:
        """Decide on a step, and remember what was decided.

        Args:
            step: its number, 1 for the first.
            grad_norm: global gradient norm, the same on all ranks.

        Returns:
            What is to be skipped; None = the step is taken.
        """
        reason = self._objection(grad_norm)
        if not reason:
            self._window.append(grad_norm)
            self.in_a_row.clear()
            return None
        skip = Skip(step, grad_norm, reason)
        self.skipped_steps += 1
        self.in_a_row.append(skip)
        return skip

    @property
    def is_exhausted(self) -> bool:
        """Whether more steps in a row have been skipped than ``guard.max_skipped_steps``."""
        return len(self.in_a_row) > self.config.max_skipped_steps

    def describe_row(self) -> str:
        """Return the skipped steps behind the last one that was taken, with their reasons, the newest in any case."""
        last = self.in_a_row[-NAMED_STEPS:]
        more = len(self.in_a_row) - len(last)
        return "; ".join([f"{more} earlier ones"] * bool(more) + [str(skip) for skip in last])

    def _objection(self, grad_norm: float) -> str:
        """Return what speaks against taking a step with this norm, or nothing."""
        if not math.isfinite(grad_norm):
            return f"gradient norm {grad_norm}"
        threshold, count = self.config.spike_threshold, len(self._window)
        if threshold == 0 or 2 * count < self.config.spike_window:
            return ""
        median = statistics.median(self._window)
        deviation = statistics.median(abs(norm - median) for norm in self._window)
        deviation = max(deviation, LEAST_DEVIATION * median)
        if grad_norm <= median + threshold * deviation:
            return ""
        return (
            f"gradient norm {grad_norm:.6g}, a spike: above {threshold:g} median absolute deviations ({deviation:.3g} "
            f"each) over {median:.3g}, the median of the last {count} steps"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a restart needs to go on deciding alike, in values that JSON holds exactly."""
        return {
            "skipped_steps": self.skipped_steps,
            # A norm that is not finite is no number in JSON; ``float`` reads it back.
            "in_a_row": [[skip.step, str(skip.grad_norm), skip.reason] for skip in self.in_a_row],
            "replicas_agreed_step": self.replicas_agreed_step,
            "window": list(self._window),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``; of a longer window than the configured one the newest norms stay."""
        self.skipped_steps = int(state["skipped_steps"])
        self.in_a_row = [Skip(int(step), float(norm), str(reason)) for step, norm, reason in state["in_a_row"]]
        self.replicas_agreed_step = int(state["replicas_agreed_step"])
        self._window = deque(map(float, state["window"]), maxlen=self.config.spike_window)
