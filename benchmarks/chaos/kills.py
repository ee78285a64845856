"""SIGKILL at random moments: of a rank, of all ranks, of the launcher, of the process that writes a checkpoint.

A case is one run that is killed until it has ended by itself; then it is compared with a run that nobody disturbed:
final weights and moments bit for bit, and every row that it was trained on.
"""

from __future__ import annotations

import itertools
import random
import shutil
import statistics
from collections import Counter
from pathlib import Path

from benchmarks.chaos.findings import Findings
from benchmarks.chaos.killed_run import KilledRun
from benchmarks.chaos.launcher import Launch
from benchmarks.chaos.peace import undisturbed
from benchmarks.chaos.processes import call_in_child
from benchmarks.chaos.small_run import DP2, PP2, TP2, Layout, make_corpus, small_config
from lcl_megatron.training.ledger_check import check_ledger

LANE = "kills"
STEPS = 40
LAYOUTS = (DP2, DP2, TP2, PP2)
"""Cases take turns."""
SAVE_INTERVAL = 5
KEPT = 3
"""Checkpoints that a run under fire keeps: deleting old ones is part of it."""
LOG_LINES = 12
"""Last lines of a failed run's output that are shown."""


def run(seed: int, target: int, folder: Path, only: int | None = None) -> Findings:
    """Kill until so many kills are done; each run goes on until it has ended by itself.

    Args:
        seed: of the campaign.
        target: kills.
        folder: scratch; on a disk, where flushing takes its time.
        only: number of the one case to repeat.
    """
    findings = Findings(LANE, seed)
    corpus = call_in_child(make_corpus, folder / "data")
    peace = {layout: undisturbed(launch(corpus, layout, folder / layout.name, 0)) for layout in dict.fromkeys(LAYOUTS)}
    done = 0
    for number in itertools.count() if only is None else [only]:
        if done >= target:
            break
        layout = LAYOUTS[number % len(LAYOUTS)]
        place = folder / f"run-{number}"
        killed = KilledRun(
            launch(corpus, layout, place, KEPT), place / "save", peace[layout], random.Random(f"{seed}/{LANE}/{number}")
        )
        killed.go(target - done)
        done += len(killed.kills)
        _add(findings, number, layout, killed)
        if not killed.problems:
            shutil.rmtree(place)
        print(
            f"{done:5} kills, {findings.figures['bit_equal_runs']} of {findings.figures['runs']} runs equal", flush=True
        )
    _summarize(findings)
    return findings


def launch(corpus: Path, layout: Layout, place: Path, keep_last: int) -> Launch:
    """Return the run of a case.

    Args:
        corpus: what it reads.
        layout: how it is spread.
        place: folder of all that it writes.
        keep_last: how many checkpoints it keeps; 0 = all.
    """
    config = small_config(
        corpus,
        layout,
        training={"train_iters": STEPS},
        checkpoint={"save": str(place / "save"), "save_interval": SAVE_INTERVAL, "keep_last": keep_last},
        # Unwatched: the survivors of a death would take 2.5 seconds to be sure of who is gone, a thousand times.
        guard={"ledger_dir": str(place / "ledger"), "hang_minutes": 0.0},
    )
    return Launch(config, layout.world_size, place)


def _add(findings: Findings, number: int, layout: Layout, killed: KilledRun) -> None:
    """Add a run to the findings."""
    verdict = killed.verdict()
    findings.cases.append({"case": number, "layout": layout.name, **verdict})
    findings.count("runs")
    findings.count("bit_equal_runs", int(verdict["equal"]))
    # Two witnesses: what the harness saw the loader give, and the run's own ledger.
    ledger = check_ledger(Path(killed.launch.config.guard.ledger_dir))
    lost, repeated = max(verdict["lost"], ledger.rows_lost), max(verdict["repeated"], ledger.rows_repeated)
    findings.count("rows_lost", lost)
    findings.count("rows_repeated", repeated)
    findings.count("rows_differing", ledger.rows_differing)
    findings.count("rows", ledger.rows)
    findings.count("rows_done_again", ledger.rows_done_again)
    findings.count("waited_for_sigterm", verdict["waited_30_s"])
    problems = list(killed.problems)
    if not verdict["equal"]:
        problems.append("its final weights or moments differ from the undisturbed run's")
    if lost or repeated:
        problems.append(f"{lost} rows lost, {repeated} repeated")
    if ledger.num_findings:
        problems.append(f"the ledger does not prove the run: {ledger.findings[0]}")
    if problems:
        killed.problems += problems
        log = killed.launch.log.read_text(encoding="utf-8", errors="replace").splitlines()
        findings.fail(number, "; ".join(dict.fromkeys(problems)) + "\n  " + "\n  ".join(log[-LOG_LINES:]))


def _summarize(findings: Findings) -> None:
    """Add the figures of all kills."""
    kills = [kill for case in findings.cases for kill in case["kills"]]
    # The death of a writer stops nobody; to count it would flatter the median.
    restarts = sorted(kill["recovery_s"] for kill in kills if kill["target"] != "writer" and kill["recovery_s"])
    alone = [kill["alone_after_s"] for kill in kills if "alone_after_s" in kill]
    findings.figures |= {
        "kills": len(kills),
        "targets": Counter(kill["target"] for kill in kills),
        "phases": Counter(kill["phase"] for kill in kills),
        "median_recovery_s": round(statistics.median(restarts), 3) if restarts else None,
        "p95_recovery_s": round(restarts[int(0.95 * (len(restarts) - 1))], 3) if restarts else None,
        "max_recovery_s": round(restarts[-1], 3) if restarts else None,
        "max_alone_after_s": round(max(alone), 3) if alone else None,
        "checkpoints_compared": sum(case["compared"] for case in findings.cases),
        "kills_without_recovery": sum(kill["recovery_s"] is None for kill in kills),
    }
