"""What happened, out of a file of events: which rows the run that counts has read, and how soon it went on."""

from __future__ import annotations

from collections import Counter
from typing import Any

Rows = dict[tuple[int, int], list[str]]
"""Digests of the rows of each (rank, step)."""


def recovery(kill: dict[str, Any], events: list[dict[str, Any]]) -> float | None:
    """Return the seconds from a kill to the next completed step, also where other kills came in between.

    Where nothing was left to train, to the end of the run. A writer's death stops nobody: the next step counts.
    """
    since = kill["time"]
    for event in events:
        if event["what"] == "start" and kill["target"] != "writer":
            begun = event["time"] >= kill["time"]
            since = float("inf") if not begun else min(since, event["time"])
        done = event["what"] == "step" or (event["what"] == "end" and event["status"] == 0)
        if done and event["time"] > max(since, kill["time"]):
            return float(event["time"] - kill["time"])
    return None


def rows_of(events: list[dict[str, Any]]) -> Rows:
    """Return the rows of each (rank, step) of the run that counts: of steps done twice, the last time."""
    return {(event["rank"], event["step"]): event["rows"] for event in events if event["what"] == "read"}


def differing_rows(expected: Rows, trained: Rows) -> tuple[int, int]:
    """Return how many rows were lost and how many came too often."""
    lost = repeated = 0
    for rank in {rank for rank, _ in expected}:
        wanted = Counter(row for (owner, _), rows in expected.items() if owner == rank for row in rows)
        found = Counter(row for (owner, _), rows in trained.items() if owner == rank for row in rows)
        lost += (wanted - found).total()
        repeated += (found - wanted).total()
    return lost, repeated
