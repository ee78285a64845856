"""The campaign's figures as tables in docs/RELIABILITY.md, and all of them in benchmarks/chaos/results.json."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.chaos.findings import Findings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "RELIABILITY.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- begin: make chaos -->", "<!-- end: make chaos -->"
LISTED_LANES = ("kills", "storage", "elastic", "numbers", "hangs", "torchrun")
"""Lanes of which the raw results hold every case; of damages and payloads, thousands, they hold the sums."""


def origin_of(seed: int) -> dict[str, Any]:
    """Return what identifies a campaign; to be called at its begin, before anybody changes a file.

    Args:
        seed: of the campaign.
    """
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "seed": seed,
        "commit": commit,
        "machine": _machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        # Of a busy machine: times to recover are those of a busy machine.
        "load": round(os.getloadavg()[0], 1),
    }


def write(origin: dict[str, Any], found: dict[str, Findings]) -> None:
    """Write the tables and the raw results of a whole campaign.

    Args:
        origin: what ``origin_of`` returned.
        found: findings by lane.
    """
    lanes = ",\n".join(f'"{name}": {_raw(lane)}' for name, lane in found.items())
    RESULTS.write_text(f'{json.dumps(origin)[:-1]},\n"lanes": {{\n{lanes}\n}}}}\n', encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    made = f"{BEGIN}\n{tables(origin, found)}\n{END}"
    PAGE.write_text(f"{before}{made}{rest.split(END)[1]}", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and {RESULTS.relative_to(ROOT)}")


def _raw(lane: Findings) -> str:
    """Return a lane as JSON, one line for each case."""
    cases = ",\n".join(json.dumps(_short(case)) for case in lane.cases if lane.lane in LISTED_LANES)
    rest = {"figures": lane.figures, "baseline": lane.baseline, "failures": lane.failures}
    return f'{json.dumps(rest)[:-1]}, "cases": [\n{cases}\n]}}'


def _short(case: dict[str, Any]) -> dict[str, Any]:
    """Return a case with each of its kills as [victim, phase, seconds to recover]."""
    if "kills" not in case:
        return case
    kills = [
        [kill["target"], kill["phase"], kill["recovery_s"] and round(kill["recovery_s"], 3)] for kill in case["kills"]
    ]
    return case | {"kills": kills}


def tables(origin: dict[str, Any], found: dict[str, Findings]) -> str:
    """Return the Markdown of all tables.

    Args:
        origin: seed, commit, machine, date.
        found: findings by lane.
    """
    figures = {name: lane.figures for name, lane in found.items()}
    baseline = found["baseline"].baseline
    failures = sum(len(lane.failures) for lane in found.values())
    seconds = sum(lane["seconds"] for lane in figures.values())
    lines = [
        f"Seed {origin['seed']}, commit {origin['commit']}, {origin['date']}, {origin['machine']}, load average "
        f"{origin['load']} before it began; {seconds / 60:.0f} minutes; {failures} cases not as promised.",
        "",
        *_table(
            ("fault", "tried", "what came of it", "megatron-core's own saving and reading"),
            [*_process_rows(figures, baseline), *_damage_rows(figures, baseline), *_run_rows(figures)],
        ),
        "",
        "SIGKILLs by victim and by what the run was doing; a kill that waited for a save to begin comes up to "
        f"{150} ms later:",
        "",
        *_kill_table(found["kills"]),
        "",
        "Under the real `torchrun --max-restarts`, imports included:",
        "",
        *_torchrun_table(found["torchrun"]),
        "",
        "What was seen of each kind of damage (checkpoints / corpora), and what megatron-core made of it:",
        "",
        *_damage_table(figures, baseline),
    ]
    return "\n".join(lines)


def _process_rows(figures: dict[str, Any], baseline: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    kills = figures["kills"]
    bound = 3 / kills["kills"]
    in_place = ", ".join(f"{number} x {what}" for what, number in sorted(baseline["kills"].items()))
    yield (
        "SIGKILL of a rank, all ranks, the launcher, the writer",
        f"{kills['kills']:,} kills in {kills['runs']} runs",
        f"{kills['bit_equal_runs']} of {kills['runs']} runs bit-equal to the undisturbed one, and the newest "
        f"checkpoint after {kills['checkpoints_compared']:,} kills; {kills['rows_lost']} rows lost, "
        f"{kills['rows_repeated']} repeated of {kills['rows']:,}; rule of three: less than {bound:.2%} of kills lose "
        "anything",
        f"after a kill during a second save into the same folder: {in_place}",
    )
    yield (
        "time to recover, imports excluded",
        f"{kills['kills'] - kills['targets'].get('writer', 0):,} kills that need a restart",
        f"median {kills['median_recovery_s']:.2f} s, 95 % {kills['p95_recovery_s']:.2f} s, longest "
        f"{kills['max_recovery_s']:.2f} s to the next completed step",
        "-",
    )
    yield (
        "the launcher is killed: who stays behind",
        f"{kills['targets'].get('launcher', 0)} kills",
        f"nobody; all gone after at most {kills['max_alone_after_s']:.2f} s",
        "-",
    )
    yield (
        "the writer of a checkpoint is killed",
        f"{kills['targets'].get('writer', 0)} kills",
        "training goes on, the next checkpoint is written",
        f"the save {baseline['writer']} (1 case, {15} s)",
    )


def _damage_rows(figures: dict[str, Any], baseline: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for lane, what in (("checkpoints", "the newest whole one is used"), ("corpora", "refused")):
        own, plain = figures[lane], baseline[lane]
        yield (
            f"damaged {lane}",
            f"{own['corruptions']:,}",
            f"{own['detected']:,} detected, {what}",
            f"{plain['detected']} of {plain['cases']} refused, {plain['wrong']} loaded with other content"
            + (f", {plain['crashed']} crashed" if plain["crashed"] else ""),
        )
    yield (
        "code in the place of data",
        f"{figures['payloads']['payloads']:,} payloads",
        f"{figures['payloads']['payloads_executed']} executed",
        f"{baseline['payloads']['executed']} of {baseline['payloads']['payloads']} executed",
    )


def _run_rows(figures: dict[str, Any]) -> Iterable[tuple[str, ...]]:
    for lane, fault, promise in (
        (
            "storage",
            "disk full, no permission, size limit, folder vanished or replaced",
            "the one before is whole; the run trains on or stops as told; mended and started again, it ends bit-equal",
        ),
        ("numbers", "NaN or infinity on one rank, gradient spikes", "all ranks skip together, nothing changes"),
        ("elastic", "resume in another layout", "weights and moments bit-equal, the same rows in the same steps"),
    ):
        own = figures[lane]
        yield fault, f"{own['cases']}", f"{own['as_promised']} of {own['cases']}: {promise}", "not run"
    hangs = figures["hangs"]
    yield (
        "a rank that is stopped, hangs, or is slow",
        f"{hangs['cases']}",
        f"{hangs['as_promised']} of {hangs['cases']} named, no other one; at most {hangs['longest_until_named_s']} s "
        f"after it stood still, at a limit of {hangs['limit_s']:g} s; the run ends bit-equal",
        "not run",
    )


def _kill_table(kills: Findings) -> list[str]:
    phases = ("start", "step", "save", "commit")
    counts: dict[tuple[str, str], int] = {}
    recoveries: dict[str, list[float]] = {}
    for kill in (kill for case in kills.cases for kill in case["kills"]):
        counts[kill["target"], kill["phase"]] = counts.get((kill["target"], kill["phase"]), 0) + 1
        if kill["recovery_s"] is not None:
            recoveries.setdefault(kill["target"], []).append(kill["recovery_s"])
    rows = []
    for target, seconds in recoveries.items():
        middle = sorted(seconds)[len(seconds) // 2]
        rows.append((target, *(str(counts.get((target, phase), 0)) for phase in phases), f"{middle:.2f} s"))
    return _table(("victim", *phases, "median time to the next step"), sorted(rows))


def _torchrun_table(torchrun: Findings) -> list[str]:
    rows = []
    for case in torchrun.cases:
        left = ""
        if case["fault"] in ("torchrun", "SIGTERM"):
            left = f"status {case['status']}; ranks gone after {case['ended_after_s']:.2f} s"
        if case["fault"] == "SIGTERM":
            left += f"; at step {case['step']}, saved {case['saved_step']}"
        rows.append((case["fault"], f"{case['recovery_s']:.1f} s", left))
    return _table(("what is killed (SIGTERM: asked to end)", "until the next step", "besides"), rows)


def _damage_table(figures: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    rows = []
    for kind, seen in figures["checkpoints"]["kinds"].items():
        corpora = figures["corpora"]["kinds"].get(kind, {})
        by = ", ".join(f"{number} by {who}" for who, number in sorted(corpora.items()))
        plain = baseline["checkpoints"]["kinds"].get(kind, {}), baseline["corpora"]["kinds"].get(kind, {})
        theirs = " / ".join(", ".join(f"{n} {what}" for what, n in sorted(one.items())) or "-" for one in plain)
        rows.append((kind, f"{seen.get('right', 0)} of {sum(seen.values())} / {by or '-'}", theirs))
    return _table(("kind", "seen", "megatron-core"), rows)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _machine() -> str:
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else []
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
