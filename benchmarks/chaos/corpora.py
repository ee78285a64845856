"""Damaged corpora: what opening one refuses, what reading every byte of it refuses, and what nothing sees."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.batches import by_kind, in_batches
from benchmarks.chaos.damage import ADDED, KINDS, damaged
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.small_run import make_corpus
from lcl_megatron.config import ConfigError
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.indexed_file import CorpusError

LANE = "corpora"
KINDS_OF_CORPORA = tuple(kind for kind in KINDS if kind not in ("folder renamed", ADDED))
"""A corpus may have any name, and other files beside its own."""
EXPLAINED = (CorpusError, ConfigError)


def run(seed: int, cases: Sequence[int], folder: Path) -> Findings:
    """Damage a corpus in many ways, one at a time.

    Args:
        seed: of the campaign.
        cases: numbers of the cases; each is a function of (seed, number).
        folder: scratch, in memory if possible.
    """
    findings = Findings(LANE, seed)
    findings.cases = in_batches(_batch, cases, findings, seed, folder)
    findings.figures = {
        "corruptions": len(cases),
        "detected": sum(case["outcome"] != "unseen" for case in findings.cases),
        "seen_by_open": sum(case["outcome"].startswith("open") for case in findings.cases),
        "seen_by_verify": sum(case["outcome"] == "verify" for case in findings.cases),
        "kinds": by_kind(findings.cases),
    }
    for case in findings.cases:
        if "unexplained" in case["outcome"]:
            findings.fail(case["case"], f"{case['file']} ({case['detail']}): {case['message']}")
        if case["outcome"] == "unseen":
            findings.fail(case["case"], f"{case['kind']}, {case['file']} ({case['detail']}) was not seen")
    return findings


def _batch(cases: Sequence[int], seed: int, folder: Path) -> list[dict[str, Any]]:
    """Try some cases, on corpora of this batch's own."""
    own, other = (make_corpus(folder / f"{name}-{cases[0]}", count) for name, count in (("own", 48), ("other", 40)))
    return [_case(number, random.Random(f"{seed}/{LANE}/{number}"), own, other) for number in cases]


def _case(number: int, rng: random.Random, own: Path, other: Path) -> dict[str, Any]:
    kind = KINDS_OF_CORPORA[number % len(KINDS_OF_CORPORA)]
    with damaged(kind, own, other, rng) as damage:
        seen_by, message = outcome(own)
    return {"case": number, **vars(damage), "outcome": seen_by, "message": message}


def outcome(corpus: Path) -> tuple[str, str]:
    """Return who saw the damage: ``open``, ``verify`` or nobody; and the message."""
    try:
        opened = Corpus.open(corpus)
    except EXPLAINED as error:
        return "open", str(error)
    except Exception as error:
        return "open, unexplained", f"{type(error).__name__}: {error}"
    try:
        opened.verify()
    except EXPLAINED as error:
        return "verify", str(error)
    return "unseen", ""
