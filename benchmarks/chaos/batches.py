"""Many cases in few processes: all cores are busy, and a crash ends one batch, which is then named."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.chaos.findings import Findings
from benchmarks.chaos.processes import ChildError, call_in_children

LARGEST_BATCH = 500
SECONDS = 300.0
Case = dict[str, Any]


def in_batches(
    batch: Callable[..., list[Case]], cases: Sequence[int], findings: Findings, *arguments: Any
) -> list[Case]:
    """Call ``batch(cases, *arguments)`` for stretches of the cases, each in a forked process.

    Args:
        batch: returns what came of each case.
        cases: their numbers.
        findings: learns of a batch that crashed.
        arguments: inherited by the fork.
    """
    processes = os.cpu_count() or 1
    size = max(1, min(LARGEST_BATCH, -(-len(cases) // processes)))
    stretches = [cases[begin : begin + size] for begin in range(0, len(cases), size)]
    results: list[Case] = []
    for begin in range(0, len(stretches), processes):
        together = stretches[begin : begin + processes]
        try:
            calls = [(batch, (stretch, *arguments)) for stretch in together]
            for answer in call_in_children(calls, timeout=SECONDS):
                results += answer
        except ChildError as error:
            findings.fail(f"{together[0][0]}-{together[-1][-1]}", f"a process ended: {error}")
    return results


def by_kind(cases: Sequence[Case]) -> dict[str, dict[str, int]]:
    """Return how often each kind of damage was tried, and how that ended."""
    rows: dict[str, dict[str, int]] = {}
    for case in cases:
        row = rows.setdefault(case["kind"], {})
        row[case["outcome"]] = row.get(case["outcome"], 0) + 1
    return rows
