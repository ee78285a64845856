"""The fault campaign: real runs, corpora and checkpoints, and all that may happen to them.

python -m benchmarks.chaos                           everything; writes docs/RELIABILITY.md; 20 minutes on two cores
python -m benchmarks.chaos --short                   every lane, few cases; a minute or two; writes nothing
python -m benchmarks.chaos --seed 3 --only kills:17  one lane, or one case of it, again

The last line is one JSON object: ``kills``, ``rows_lost``, ``rows_repeated``, ``bit_equal`` (every run that was killed
ended with the weights and moments of the undisturbed one), ``median_recovery_s`` (from a kill to the next completed
step, imports excluded), ``corruptions``, ``detected`` and ``payloads_executed``. Exit status 1 = something is not as
promised; each such case prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a process that has started a thread pool must not fork
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

from benchmarks.chaos import lanes, report
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.processes import adopt_orphans
from lcl_megatron.parallel import cpu_host


def summary(found: dict[str, Findings]) -> dict[str, Any]:
    """Return the figures of the last line; 0 or None for lanes that were not run."""

    def figure(lane: str, name: str, absent: Any = 0) -> Any:
        return found[lane].figures.get(name, absent) if lane in found else absent

    runs = figure("kills", "runs")
    return {
        "kills": figure("kills", "kills"),
        "rows_lost": figure("kills", "rows_lost"),
        "rows_repeated": figure("kills", "rows_repeated"),
        "bit_equal": runs > 0 and figure("kills", "bit_equal_runs") == runs,
        "median_recovery_s": figure("kills", "median_recovery_s", None),
        "corruptions": figure("checkpoints", "corruptions") + figure("corpora", "corruptions"),
        "detected": figure("checkpoints", "detected") + figure("corpora", "detected"),
        "payloads_executed": figure("payloads", "payloads_executed"),
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="chooses victims, moments and places")
    parser.add_argument("--short", action="store_true", help="few cases of every lane")
    parser.add_argument("--only", metavar="LANE[:CASE]", help=f"one lane, or one case of it: {', '.join(lanes.LANES)}")
    parser.add_argument("--kills", type=int, help="SIGKILLs, instead of 1,000")
    parser.add_argument("--folder", type=Path, help="scratch folder on a disk, kept; default: a temporary one")
    flags = parser.parse_args(arguments)
    if flags.only and flags.only.split(":")[0] not in lanes.LANES:
        parser.error(f"--only {flags.only}: there is no such lane; expected one of {', '.join(lanes.LANES)}")
    return flags


def main(arguments: list[str]) -> int:
    """Run the lanes, print what they find, write the table; return the exit status."""
    flags = parse(arguments)
    cpu_host.install()
    adopt_orphans()
    sizes = lanes.SHORT if flags.short else lanes.FULL
    found: dict[str, Findings] = {}
    crashed = False
    begin, origin = time.monotonic(), report.origin_of(flags.seed)
    with tempfile.TemporaryDirectory(prefix="chaos-") as disk, lanes.memory_folder() as memory:
        for name in lanes.LANES if not flags.only else [flags.only.split(":")[0]]:
            since = time.monotonic()
            places = lanes.Places((flags.folder or Path(disk)) / name, memory / name)
            job = lanes.Job(flags.seed, sizes, places, lanes.cases_of(flags.only), flags.kills)
            try:
                found[name] = lanes.LANES[name](job)
            except Exception:
                traceback.print_exc(file=sys.stdout)
                found[name] = Findings(name, flags.seed)
                found[name].fail("all", "the lane ended with an error")
                crashed = True
            found[name].figures["seconds"] = round(time.monotonic() - since, 1)
            print(f"{name}: {json.dumps(found[name].figures | found[name].baseline)}", flush=True)
    failures = [failure for lane in found.values() for failure in lane.failures]
    print(f"{len(failures)} failures, {time.monotonic() - begin:.0f} s")
    if not (flags.short or flags.only or flags.kills or crashed):
        report.write(origin, found)
    print(json.dumps(summary(found)))
    return 1 if failures else 0


# megatron-core's saver, which the baseline uses, starts a process that imports this file again.
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
