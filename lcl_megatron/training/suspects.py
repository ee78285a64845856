"""Who holds up the others: from two readings of the board of heartbeats to names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from lcl_megatron.parallel.heartbeats import Beat

Phase = Literal["start", "load", "data", "agree", "forward_backward", "optimizer", "report", "save", "failed", "end"]
"""What a rank does, in the order of a step. ``data`` = it waits for its loader; ``agree`` = first collective of a step;
``failed`` = a collective failed on it, because of another rank; ``end`` = it left the run."""
MAX_NAMED = 16
"""Ranks that are named; of more, only their number is said."""
_ORDER: dict[str, int] = {phase: place for place, phase in enumerate(get_args(Phase))}


@dataclass(frozen=True)
class Reading:
    """The board at one moment."""

    at: float
    """Seconds on the reader's monotonic clock."""
    beats: Sequence[Beat]
    """Last beat of every rank."""


def name_suspects(first: Reading, second: Reading, describe: Callable[[int], str]) -> list[str]:
    """Return a line for each rank that holds up the others, as far as the board shows.

    A rank is *behind* if its (step, phase) is the least and another's is not, or another's collective has failed. It is
    *silent* if it wrote nothing between the readings: stopped, dead, or cut off.

    Args:
        first: the board some beats ago: the readings must be farther apart than any living rank's beats.
        second: the board now.
        describe: rank with coordinates.

    Returns:
        E.g. ``rank 1 (dp1 pp0 tp0) is behind: step 7, data, for 300 s`` or ``rank 2 (dp2 pp0 tp0) is behind: last heard
        of in step 7, agree, silent for at least 150 s``; one line that says so if no rank differs from the others.
    """
    running = [(beat.step, _ORDER[beat.phase]) for beat in second.beats if beat.phase not in ("failed", "end")]
    differ = len(set(running)) > 1 or any(beat.phase == "failed" for beat in second.beats)
    lines = []
    for rank, (before, now) in enumerate(zip(first.beats, second.beats, strict=True)):
        if now.phase == "end":
            lines.append(f"{describe(rank)} left the run in step {now.step}: see its own messages")
        if now.phase in ("failed", "end"):
            continue
        is_silent = before.count == now.count
        is_behind = differ and (now.step, _ORDER[now.phase]) == min(running)
        if not is_silent and not is_behind:
            continue
        place = f"step {now.step}, {now.phase}"
        if is_silent:
            # Between its last beat and its end it may have come a little farther.
            place = f"last heard of in {place}, silent for at least {second.at - first.at:.0f} s"
        else:
            place += f", for {now.seconds:.0f} s"
        lines.append(f"{describe(rank)} is {'behind' if is_behind else 'silent'}: {place}")
    if not lines:
        beat = second.beats[0]
        return [f"no rank is behind: all {len(second.beats)} are in step {beat.step}, {beat.phase}, and alive"]
    more = len(lines) - MAX_NAMED
    return [*lines[:MAX_NAMED], f"and {more} more ranks"] if more > 0 else lines
