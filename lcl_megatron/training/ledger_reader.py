"""Reading a ledger back: which attempts there were, and where the record of every step lies.

A long run's ledger does not fit in memory. Here only the places of records are kept; the rows of one are read when they
are looked at.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lcl_megatron.training.ledger import Attempt, ledger_file

SHOWN_FINDINGS = 20
"""Findings that are kept in words; more are only counted."""
_TYPES = {"str": str, "int": int, "bool": bool}


class LedgerError(ValueError):
    """A folder that holds no ledger."""


class Findings:
    """What is wrong with a ledger: the first findings in words, and their number."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, message: str) -> None:
        """Note one thing that is wrong."""
        self.count += 1
        if len(self.shown) < SHOWN_FINDINGS:
            self.shown.append(message)


@dataclass(frozen=True)
class Place:
    """Where a record lies."""

    path: Path
    """File."""
    line: int
    """Number of its line, from 1."""
    offset: int
    """Byte at which the line begins."""
    skipped: bool
    """Whether the step left the weights as they were."""

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"

    def rows(self) -> list[tuple[int, str]]:
        """Return number and hash of every row of the record."""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            return [(number, value) for number, value in json.loads(stream.readline())["rows"]]


@dataclass
class Recorded:
    """An attempt and where its records lie."""

    header: Attempt
    """What it announced."""
    ranks: set[int] = field(default_factory=set)
    """Data-parallel ranks that announced it."""
    steps: dict[int, dict[int, Place]] = field(default_factory=dict)
    """For each step, the record of each rank that has one."""

    @property
    def name(self) -> str:
        """The attempt in a message."""
        return f"attempt {self.header.attempt}"

    def first_row(self, step: int) -> int:
        """Return the number of a step's first row."""
        return self.header.consumed_rows + (step - self.header.resumed_at_step) * self.header.global_batch_size


def read_ledger(folder: Path, findings: Findings) -> list[Recorded]:
    """Return all attempts of a ledger, in the order in which they began.

    Args:
        folder: of the ledger.
        findings: receives what is damaged.

    Raises:
        LedgerError: the folder holds no ledger.
    """
    paths = sorted(folder.glob("rank-*.jsonl"))
    if not paths:
        raise LedgerError(f"no ledger in {folder}: no rank-NNNNN.jsonl there; give the --ledger-dir of a run")
    attempts: dict[str, Recorded] = {}
    # Rank 0 is there in every attempt, so that its file has all of them in order.
    for path in paths:
        _Reader(path, attempts, findings).read()
    if paths[0] != ledger_file(folder, 0):
        findings.add(f"{ledger_file(folder, 0).name} is missing")
    return list(attempts.values())


class _Reader:
    """Reads the file of one rank.

    Args:
        path: the file.
        attempts: by name; receives what the file holds.
        findings: receives what is damaged.
    """

    def __init__(self, path: Path, attempts: dict[str, Recorded], findings: Findings) -> None:
        self._path, self._attempts, self._findings = path, attempts, findings
        self._rank = int(path.stem.removeprefix("rank-"))
        self._current: Recorded | None = None

    def read(self) -> None:
        """Read all lines."""
        damaged = ""
        for place, entry, reason in self._entries():
            if "resumed_at_step" in entry:
                damaged = ""  # the last line of an attempt that was killed
            if damaged:
                self._findings.add(damaged)
            damaged = "" if entry else f"{place} is damaged: {reason}"
            if "resumed_at_step" in entry:
                self._begin(place, Attempt(**entry))
            elif entry:
                self._add(place, entry["attempt"], entry["step"])
        if damaged and self._ends_with_a_line():
            self._findings.add(damaged)

    def _entries(self) -> Iterator[tuple[Place, dict[str, Any], str]]:
        """Yield each line's place and content; of one that is no entry {} and the reason."""
        offset = 0
        with open(self._path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                place, begin = Place(self._path, number, offset, skipped=False), offset
                offset += len(line)
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    _check_entry(entry)
                except (ValueError, RecursionError) as error:
                    yield place, {}, str(error)
                else:
                    yield Place(self._path, number, begin, bool(entry.get("skipped"))), entry, ""

    def _ends_with_a_line(self) -> bool:
        """Return whether the last line is complete: it was not cut off by a kill."""
        with open(self._path, "rb") as stream:
            stream.seek(-1, 2)
            return stream.read() == b"\n"

    def _begin(self, place: Place, header: Attempt) -> None:
        self._current = self._attempts.setdefault(header.attempt, Recorded(header))
        if self._current.header != header:
            self._findings.add(f"{place} announces {self._current.name} otherwise than another rank")
        if self._rank in self._current.ranks:
            self._findings.add(f"{place} announces {self._current.name} once more")
        if self._rank >= header.dp_size:
            self._findings.add(f"{place}: {self._current.name} has no rank {self._rank}, only {header.dp_size} ranks")
        self._current.ranks.add(self._rank)

    def _add(self, place: Place, attempt: str, step: int) -> None:
        if self._current is None or self._current.header.attempt != attempt:
            self._findings.add(
                f"{place} is of attempt {attempt}, which does not begin before it; do two runs write here?"
            )
            return
        ranks = self._current.steps.setdefault(step, {})
        if self._rank in ranks:
            self._findings.add(f"{place} repeats step {step} of {self._current.name} ({ranks[self._rank]})")
            return
        ranks[self._rank] = place


def _check_entry(entry: Any) -> None:
    """Raise ValueError unless this is an attempt's header or a step's record."""
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object")
    if "resumed_at_step" in entry:
        expected = {f.name: _TYPES[str(f.type)] for f in fields(Attempt)}
    else:
        expected = {"attempt": str, "step": int, "skipped": bool, "rows": list}
    if entry.keys() != expected.keys():
        raise ValueError(f"it has the fields {', '.join(entry)}; expected {', '.join(expected)}")
    for name, kind in expected.items():
        if type(entry[name]) is not kind:
            raise ValueError(f"{name} is {entry[name]!r}; expected {kind.__name__}")
    for row in entry.get("rows", ()):
        if not (isinstance(row, list) and [type(part) for part in row] == [int, str]):
            raise ValueError(f"{row!r} is no row; expected its number and its hash")
