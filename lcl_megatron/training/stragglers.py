"""Naming ranks that are slow: whose own work takes longer than that of ranks with the same work to do.

Step times do not tell: all ranks wait for the slowest, so all are equally slow. Own work is what a rank does without
waiting for the others: waiting for its own data, and the model's forward passes. Under tensor and context parallelism
the ranks of a group wait for each other inside their layers, so the peers of a slow rank are named with it.

A rank is compared with the ranks of its pipeline stage, the only ones that have the same to do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import TYPE_CHECKING

from lcl_megatron.parallel.report import gather_over_ranks

if TYPE_CHECKING:
    from lcl_megatron.parallel.groups import ProcessGroups

logger = logging.getLogger(__name__)

MAX_NAMED = 8
"""Slow ranks named in one report, the slowest first."""
LEAST_SHARE = 0.05
"""A rank that costs a smaller share of the step is not named, whatever the ratio ..."""
LEAST_MS = 10.0
"""... nor one that costs so little a step, which a busy host can do to any rank."""


@dataclass(frozen=True)
class RankWork:
    """What one rank did by itself, mean over the steps of a report."""

    data_ms: float
    """It waited for its data."""
    forward_ms: float
    """It was inside the model's forward passes."""

    @property
    def total_ms(self) -> float:
        """Own work of a step."""
        return self.data_ms + self.forward_ms


@dataclass(frozen=True)
class Straggler:
    """A slow rank."""

    rank: int
    """Global rank."""
    work: RankWork
    """What it did."""
    median_ms: float
    """Own work of the median rank of its pipeline stage."""


def find_stragglers(
    work: Sequence[RankWork], num_stages: int, ratio: float, least_ms: float = 0.0
) -> tuple[Straggler, ...]:
    """Return the ranks that are slow, the slowest first.

    Args:
        work: of every rank, in the order of ranks, which are numbered stage by stage.
        num_stages: ranks of a pipeline.
        ratio: own work, in medians of the stage, above which a rank is slow. The median of an even number of ranks is
            the lower one of the middle two, so that one of two ranks can be slow.
        least_ms: how much longer than the median it must take besides.
    """
    found: list[Straggler] = []
    size = len(work) // num_stages
    for begin in range(0, len(work), size):
        median = median_low([one.total_ms for one in work[begin : begin + size]])
        found += [
            Straggler(rank, work[rank], median)
            for rank in range(begin, begin + size)
            if work[rank].total_ms > ratio * median and work[rank].total_ms - median > least_ms
        ]
    return tuple(sorted(found, key=lambda straggler: -straggler.work.total_ms))


def report_work(own: RankWork, groups: ProcessGroups, ratio: float, step_ms: float) -> dict[str, float]:
    """Compare all ranks, warn on rank 0 of the slow ones, and return the metrics; collective over all ranks.

    Args:
        own: this rank's work.
        groups: process groups.
        ratio: ``guard.straggler_ratio``; 0 = nothing is compared.
        step_ms: how long a step took.

    Parallel: one all-gather of two float64 over all ranks, on the host.
    """
    if ratio == 0:
        return {}
    work = [RankWork(*values) for values in gather_over_ranks([own.data_ms, own.forward_ms], groups)]
    if groups.rank == 0:
        _warn(find_stragglers(work, groups.pp_size, ratio, max(LEAST_MS, LEAST_SHARE * step_ms)), groups)
    totals = [one.total_ms for one in work]
    return {"perf/slowest_rank_ms": max(totals), "perf/median_rank_ms": median_low(totals)}


def _warn(stragglers: Sequence[Straggler], groups: ProcessGroups) -> None:
    """Name slow ranks."""
    names = [name for name, size in (("tp", groups.tp_size), ("cp", groups.cp_size)) if size > 1]
    shared = f" with its {' and '.join(names)} peers" if names else ""
    for straggler in stragglers[:MAX_NAMED]:
        logger.warning(
            "slow: %s works %.0f ms a step, the median rank %.0f ms (data %.0f ms, forward %.0f ms%s)",
            groups.describe(straggler.rank),
            straggler.work.total_ms,
            straggler.median_ms,
            straggler.work.data_ms,
            straggler.work.forward_ms,
            shared,
        )
    if len(stragglers) > MAX_NAMED:
        logger.warning("slow: and %d more ranks", len(stragglers) - MAX_NAMED)
