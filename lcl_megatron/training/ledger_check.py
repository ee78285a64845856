"""Proof from a ledger that a run trained on every row of its order once: none lost, none repeated, none another.

A run that is interrupted goes on from its last checkpoint and does again what came after it. Its history is, for each
step, what the last attempt did that began at or before it: an attempt that began at step k takes back all that earlier
attempts did from step k on. Of what was taken back is asked only that it was the same: a row that is read again, on
whatever rank and under whatever layout, must hold what it held the first time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lcl_megatron.training.ledger_reader import Findings, Place, Recorded, read_ledger

NAMED_ROWS = 4
"""Rows that a finding lists."""

RowHashes = dict[tuple[str, int], tuple[str, Place]]
"""Hash of a row, and where it stands in the ledger, by the fingerprint of the data and the row's number."""


@dataclass(frozen=True)
class Stretch:
    """Steps of the history that one attempt did."""

    recorded: Recorded
    """The attempt."""
    begin: int
    """First step."""
    end: int
    """Step behind the last."""


@dataclass(frozen=True)
class LedgerReport:
    """What a ledger proves."""

    stretches: tuple[Stretch, ...]
    """The history, in order."""
    attempts: int
    """Attempts, those included that trained no step."""
    rows: int
    """Rows that the history read."""
    rows_lost: int
    """Rows of the order that were to be read by a step of the history and were not."""
    rows_repeated: int
    """Rows that a step of the history read twice, or that are another step's."""
    rows_differing: int
    """Rows that held something else when they were read again."""
    rows_done_again: int
    """Rows of the history that an earlier attempt had read too, with which they were compared."""
    steps_skipped: int
    """Steps of the history that left the weights as they were; their rows are consumed."""
    findings: tuple[str, ...]
    """The first things that are wrong, in words; empty = the run is proved."""
    num_findings: int
    """All of them."""

    @property
    def steps(self) -> int:
        """Steps of the history."""
        return sum(stretch.end - stretch.begin for stretch in self.stretches)

    def table(self) -> str:
        """Return the history as lines of text, and what is wrong with it."""
        lines = [f"{'attempt':16}  {'steps of the history':>21}  {'ranks':>5}  {'batch':>6}  {'first row':>12}"]
        for stretch in self.stretches:
            header, steps = stretch.recorded.header, f"{stretch.begin:,} to {stretch.end - 1:,}"
            first = f"{stretch.recorded.first_row(stretch.begin):,}"
            lines.append(
                f"{header.attempt:16}  {steps:>21}  {header.dp_size:5}  {header.global_batch_size:6}  {first:>12}"
            )
        lines.append(
            f"{self.steps:,} steps, {self.steps_skipped:,} of them without an update; {self.rows:,} rows, of which "
            f"{self.rows_done_again:,} had been read before an interruption too"
        )
        lines += [f"WRONG: {finding}" for finding in self.findings]
        if self.num_findings > len(self.findings):
            lines.append(f"WRONG: {self.num_findings - len(self.findings):,} findings more")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the figures as one line of JSON."""
        names = ("steps", "rows", "rows_lost", "rows_repeated", "rows_differing", "attempts")
        return json.dumps({name: getattr(self, name) for name in (*names, "rows_done_again", "steps_skipped")})


def check_ledger(folder: Path, from_step: int = 0) -> LedgerReport:
    """Read all of a run's ledger and prove its history.

    Args:
        folder: of the ledger, ``guard.ledger_dir``.
        from_step: first step that must be there: above 0 for a run whose ledger was begun later than the run.

    Raises:
        LedgerError: the folder holds no ledger.
    """
    findings = Findings()
    attempts = read_ledger(folder, findings)
    stretches = [part for part in _history(attempts) if part.end > from_step]
    stretches = [replace(part, begin=max(part.begin, from_step)) for part in stretches]
    check = _Check(findings, _taken_back(attempts, stretches, findings))
    check.joints(stretches, from_step)
    for stretch in stretches:
        check.stretch(stretch)
    counts = check.counts
    return LedgerReport(
        stretches=tuple(stretches),
        attempts=len(attempts),
        rows=counts["read"],
        rows_lost=counts["lost"],
        rows_repeated=counts["repeated"],
        rows_differing=counts["differing"] + check.taken_back.differing,
        rows_done_again=counts["again"],
        steps_skipped=counts["skipped"],
        findings=tuple(findings.shown),
        num_findings=findings.count,
    )


def _history(attempts: Sequence[Recorded]) -> list[Stretch]:
    """Return the steps of each attempt that no later one took back. An attempt that trained nothing takes back none."""
    history: list[Stretch] = []
    for recorded in attempts:
        if recorded.steps:
            begin = recorded.header.resumed_at_step
            kept = (replace(stretch, end=min(stretch.end, begin)) for stretch in history)
            history = [stretch for stretch in kept if stretch.end > stretch.begin]
            history.append(Stretch(recorded, begin, max(recorded.steps) + 1))
    if history:
        # A kill comes between the records of different ranks: the last step of all may not be on every one of them.
        last = history[-1]
        missing = set(range(last.recorded.header.dp_size)) - last.recorded.steps[last.end - 1].keys()
        if missing and missing <= last.recorded.ranks:
            history[-1] = replace(last, end=last.end - 1)
    return [stretch for stretch in history if stretch.end > stretch.begin]


@dataclass(frozen=True)
class _TakenBack:
    """Rows of records that are not part of the history."""

    hashes: RowHashes
    """What they held."""
    differing: int
    """Those that differed among themselves."""


def _taken_back(attempts: Iterable[Recorded], history: Iterable[Stretch], findings: Findings) -> _TakenBack:
    """Read the records that are not part of the history; few, for they reach from a checkpoint to a kill."""
    kept = {id(stretch.recorded): range(stretch.begin, stretch.end) for stretch in history}
    hashes: RowHashes = {}
    differing = 0
    for recorded in attempts:
        steps = (step for step in sorted(recorded.steps) if step not in kept.get(id(recorded), range(0)))
        for place in (place for step in steps for place in recorded.steps[step].values()):
            for number, value in place.rows():
                known, before = hashes.setdefault((recorded.header.data, number), (value, place))
                if known != value:
                    differing += 1
                    findings.add(f"row {number} differs between {before} and {place}")
    return _TakenBack(hashes, differing)


class _Check:
    """Goes through a history and counts what is wrong.

    Args:
        findings: receives what is wrong, in words.
        taken_back: what earlier attempts had read.
    """

    def __init__(self, findings: Findings, taken_back: _TakenBack) -> None:
        self.taken_back = taken_back
        self.counts: Counter[str] = Counter()
        self._findings = findings

    def joints(self, history: Sequence[Stretch], from_step: int) -> None:
        """Check that each stretch begins where the one before ends, in steps and in rows."""
        if not history:
            self._findings.add(f"no step from {from_step} on is recorded")
        step = from_step
        for before, stretch in zip([None, *history], history, strict=False):
            recorded = stretch.recorded
            if stretch.begin > step:
                self._findings.add(
                    f"steps {step} to {stretch.begin - 1} are not recorded; {recorded.name} follows them"
                )
                self.counts["lost"] += (stretch.begin - step) * recorded.header.global_batch_size
            step = stretch.end
            first = recorded.first_row(stretch.begin)
            if before is None:
                expected = 0 if stretch.begin == 0 else first
            elif before.recorded.header.data == recorded.header.data:
                expected = before.recorded.first_row(stretch.begin)
            else:
                expected = 0
                if not recorded.header.allow_data_change:
                    self._findings.add(f"{recorded.name} reads other data than {before.recorded.name}")
            if first != expected:
                self._findings.add(f"{recorded.name} begins with row {first}; expected row {expected}")
                self.counts["lost" if first > expected else "repeated"] += abs(first - expected)

    def stretch(self, stretch: Stretch) -> None:
        """Check the steps of one attempt."""
        recorded = stretch.recorded
        for rank in sorted(set(range(recorded.header.dp_size)) - recorded.ranks):
            self._findings.add(f"rank {rank} has no record of {recorded.name}: its file is missing or another's")
        for step in range(stretch.begin, stretch.end):
            self._step(recorded, step)

    def _step(self, recorded: Recorded, step: int) -> None:
        """Check that the ranks of a step read its rows, each once."""
        places = recorded.steps.get(step, {})
        first, size = recorded.first_row(step), recorded.header.global_batch_size
        seen: set[int] = set()
        wrong: list[int] = []
        for place in places.values():
            for number, value in place.rows():
                self.counts["read"] += 1
                if number in seen or not first <= number < first + size:
                    wrong.append(number)
                seen.add(number)
                self._compare(recorded, place, number, value)
        lost = sorted(set(range(first, first + size)) - seen)
        self.counts.update(lost=len(lost), repeated=len(wrong))
        where = f"step {step} of {recorded.name}"
        if lost:
            absent = sorted(set(range(recorded.header.dp_size)) - places.keys())
            of_ranks = f"; no record of rank {_listed(absent)}" if absent else ""
            self._findings.add(f"{where} lacks row {_listed(lost)}{of_ranks}")
        if wrong:
            self._findings.add(f"{where} read row {_listed(wrong)} twice, or in another step's place")
        skipped = {place.skipped for place in places.values()}
        if len(skipped) > 1:
            self._findings.add(f"{where} was skipped on some ranks only")
        self.counts["skipped"] += True in skipped

    def _compare(self, recorded: Recorded, place: Place, number: int, value: str) -> None:
        """Check that a row that was read before holds the same."""
        known = self.taken_back.hashes.get((recorded.header.data, number))
        if known is None:
            return
        self.counts["again"] += 1
        if known[0] != value:
            self.counts["differing"] += 1
            self._findings.add(f"row {number} differs between {known[1]} and {place}")


def _listed(numbers: Sequence[int]) -> str:
    """Return numbers as words: ``3, 4 and 2 more``."""
    shown = ", ".join(map(str, numbers[:NAMED_ROWS]))
    return shown if len(numbers) <= NAMED_ROWS else f"{shown} and {len(numbers) - NAMED_ROWS} more"
