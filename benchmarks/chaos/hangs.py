"""Ranks that stop, hang for a while or for good, or are slow: each must be named, and the run must go on.

A rank is stopped from outside (SIGSTOP), waits for its data for longer than ``guard.hang_minutes``, never gets on at
all, or needs longer than the others for every step. At the end, weights and moments equal those of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos.batches import by_kind
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.launcher import EventReader, Launch
from benchmarks.chaos.peace import STUCK_S, Undisturbed, undisturbed
from benchmarks.chaos.processes import call_in_child, wait_until_alone
from benchmarks.chaos.small_run import DP2, make_corpus, small_config
from benchmarks.chaos.stored import tensor_digests
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.training.run import Run

LANE = "hangs"
STEPS = 30
HANG_S, COLLECTIVE_S = 3.0, 9.0
"""``guard.hang_minutes`` and ``parallel.distributed_timeout_minutes``, in seconds."""
SLOW_S = 0.06
SLACK_S = 5.0
"""A rank that hangs is named at most so long after the limit: it is looked at in intervals, twice, by all."""
KINDS = ("stopped", "waits", "hangs for good", "slow")


def run(seed: int, cases: list[int], folder: Path) -> Findings:
    """Let ranks hang and be slow.

    Args:
        seed: of the campaign.
        cases: numbers of the cases.
        folder: scratch.
    """
    findings = Findings(LANE, seed)
    corpus = call_in_child(make_corpus, folder / "data")
    peace = undisturbed(_launch(corpus, folder / "peace", None))
    for number in cases:
        kind, rank, step = draw(seed, number)
        case = _Case(kind, rank, step, _launch(corpus, folder / f"case-{number}", _inside(kind, rank, step, folder)))
        record = {"case": number, "kind": kind, "rank": rank, "step": step} | case.go(peace)
        findings.cases.append(record)
        if record["problems"]:
            findings.fail(number, f"{kind}, rank {rank}, step {step}: {'; '.join(record['problems'])}\n{case.tail()}")
    named = [case["named_after_s"] for case in findings.cases if case["kind"] != "slow" and case["named_after_s"]]
    findings.figures = {
        "cases": len(cases),
        "as_promised": sum(case["outcome"] == "as promised" for case in findings.cases),
        "limit_s": HANG_S,
        "longest_until_named_s": round(max(named), 2) if named else None,
        "kinds": by_kind(findings.cases),
    }
    return findings


def draw(seed: int, number: int) -> tuple[str, int, int]:
    """Return what happens in a case, to which rank, and at which step."""
    rng = random.Random(f"{seed}/{LANE}/{number}")
    return KINDS[number % len(KINDS)], rng.randrange(2), rng.randint(3, STEPS - 10)


def _launch(corpus: Path, place: Path, on_ready: Callable[[int, Run], None] | None) -> Launch:
    config = small_config(
        corpus,
        DP2,
        training={"train_iters": STEPS},
        checkpoint={"save": str(place / "save"), "save_interval": 5},
        guard={"hang_minutes": HANG_S / 60},
        parallel={"distributed_timeout_minutes": COLLECTIVE_S / 60},
        logging={"log_interval": 10},
    )
    return Launch(config, 2, place, max_restarts=3, on_ready=on_ready)


def _inside(kind: str, victim: int, step: int, folder: Path) -> Callable[[int, Run], None]:
    """Return what makes a rank slow from inside; it happens once, and not again when the run is started again."""

    def on_ready(rank: int, run: Run) -> None:
        if rank == victim and run.progress.step < step:
            run.loader = _slow(run.loader, kind, step, folder / f"done-{kind}-{victim}-{step}")

    return on_ready


def _slow(loader: Iterable[StepBatch], kind: str, step: int, done: Path) -> Iterator[StepBatch]:
    for batch in loader:
        if kind == "slow":
            time.sleep(SLOW_S)
        if batch.step == step and kind in ("waits", "hangs for good") and not done.exists():
            done.touch()
            time.sleep(HANG_S + SLACK_S if kind == "waits" else 3600)
        yield batch


class _Case:
    """One run with a rank that hangs or is slow.

    Args:
        kind: one of ``KINDS``.
        rank: which.
        step: when.
        launch: the run.
    """

    def __init__(self, kind: str, rank: int, step: int, launch: Launch) -> None:
        self._kind, self._rank, self._step = kind, rank, step
        self._launch = launch
        # As the messages of watchdog and stragglers begin.
        verb = r"slow: rank {0} \(" if kind == "slow" else r"rank {0} \(.*\) is (behind|silent)"
        self._name = re.compile(verb.format(rank))
        self._other = re.compile(verb.format(1 - rank))

    def go(self, peace: Undisturbed) -> dict[str, Any]:
        """Start, disturb, wait for the name, let it go on, compare."""
        events, problems = EventReader(self._launch.events), []
        self._launch.start()
        begin = self._wait_for_step(events)
        stopped = self._stop(events) if self._kind == "stopped" else None
        named = self._wait_for_name(begin)
        if stopped is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGCONT)
        problems += [f"did not end: {line}" for line in wait_until_alone(STUCK_S)]
        limit = STUCK_S if self._kind == "slow" else HANG_S + SLACK_S
        if named is None or named > limit:
            problems.append(f"rank {self._rank} was not named within {limit:.0f} s")
        if self._other.search(self._text()):
            problems.append(f"rank {1 - self._rank} was named")
        if tensor_digests(Path(self._launch.config.checkpoint.save), STEPS) != tensor_digests(peace.save, STEPS):
            problems.append("the run did not end as the undisturbed one")
        outcome = "not as promised" if problems else "as promised"
        return {"named_after_s": named, "outcome": outcome, "problems": problems}

    def _wait_for_step(self, events: EventReader) -> float:
        """Wait until the victim has read the step; return the time."""
        end = time.monotonic() + STUCK_S
        while time.monotonic() < end:
            for event in events.read():
                if event["what"] in ("read", "step") and event["rank"] == self._rank and event["step"] >= self._step:
                    return float(event["time"])
            time.sleep(0.002)
        raise RuntimeError(f"rank {self._rank} did not get to step {self._step}:\n{self.tail()}")

    def _stop(self, events: EventReader) -> int:
        start = next(event for event in events.events if event["what"] == "start")
        process = int(start["ranks"][str(self._rank)])
        os.kill(process, signal.SIGSTOP)
        return process

    def _wait_for_name(self, begin: float) -> float | None:
        """Return how long after the begin the rank is named."""
        while time.monotonic() < begin + STUCK_S:
            if self._name.search(self._text()):
                return time.monotonic() - begin
            time.sleep(0.01)
        return None

    def _text(self) -> str:
        return self._launch.log.read_text(encoding="utf-8", errors="replace")

    def tail(self) -> str:
        """Return the last lines of what the ranks printed."""
        return "\n".join(self._text().splitlines()[-30:])
