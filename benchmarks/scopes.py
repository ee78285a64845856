"""What the contrast of the whole global batch costs, and what layouts cost, on a CPU.

python benchmarks/scopes.py            a small model, eight runs, each several times
python benchmarks/scopes.py --quick    a minute or two, for starting processes; at sizes that say nothing

All runs train the same model on the same global batches. ``scope_time_ratio`` is the time of a step with
``contrastive_scope = global`` over that with ``micro_batch``, for several micro-batches: at most 4/3 is expected,
because of a second forward pass, which leaves out the vocabulary. ``keep_graphs_time_ratio`` is the same where
activations are kept instead, and ``one_micro_batch_ratio`` the same with one micro-batch; both should be 1.
``layout_ratio`` is the processor time of all ranks of a layout over that of one process, scope ``global`` in both;
ranks share the machine's cores, so their wall time says little.

Every run has processes of its own, over gloo, one thread each. Runs take turns (A B C A B C ...); of each, the median
step counts, summed over its ranks, and of that the least of all repetitions: others may be using the machine. Times are
processor time unless their name says wall, and begin behind the loader. ``loss_difference`` is the largest relative
difference of the first step's loss between all runs that contrast the whole global batch: it is the same function.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from synthetic import SyntheticCorpus

SCRIPT = Path(__file__).with_name("scopes_rank.py")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is run."""

    data_path: str = ""
    """Folder of a preprocessed corpus; empty = a synthetic one."""
    steps: int = 5
    """Measured steps of each run."""
    repeats: int = 3
    """Times that each run is run."""
    rows: int = 16
    """Rows of the global batch."""
    micro_batch_size: int = 2
    """Rows of one forward pass, where there are several."""
    width: int = 128
    """Width of both towers; heads have 64 channels, and two tensor-parallel ranks need two of them."""
    layers: int = 2
    """Layers of both towers."""
    quick: bool = False
    """Four rows, one step, once; for tests."""

    def runs(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """Return the ranks of each run, and in what it differs from one process with scope ``micro_batch``."""
        whole = {"scope": "global"}
        one = {"micro_batch_size": self.rows}
        return {
            "micro_batch": (1, {}),
            "global": (1, whole),
            "global_keep_graphs": (1, whole | {"keep_graphs": True}),
            "one_micro_batch": (1, one),
            "global_one_micro_batch": (1, one | whole),
            "global_dp2": (2, whole),
            "global_tp2": (2, whole | {"tensor": 2}),
            "global_pp2": (2, whole | {"pipeline": 2}),
        }


def launch(ranks: int, case: dict[str, Any]) -> dict[str, Any]:
    """Run the ranks; return times of the median step, and losses summed over ranks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = [str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as folder:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        arguments = [str(SCRIPT), json.dumps(case | {"folder": folder})]
        finished = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True)
        if finished.returncode:
            # Every run logs its configuration, which is worth reading only where one fails.
            sys.stderr.write(finished.stderr)
            finished.check_returncode()
        reports = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="ascii")) for rank in range(ranks)]
    summed = {
        key: [sum(values) for values in zip(*(report[key] for report in reports), strict=True)]
        for key in ("cpu_s", "generation", "contrastive")
    }
    slowest = [max(values) for values in zip(*(report["wall_s"] for report in reports), strict=True)]
    return {
        "cpu_ms": 1000 * statistics.median(summed["cpu_s"]),
        "wall_ms": 1000 * statistics.median(slowest),
        "generation": summed["generation"],
        "contrastive": summed["contrastive"],
    }


def measure(flags: Flags, corpus: Path) -> dict[str, dict[str, Any]]:
    """Run everything in turn; return for each run the least times, and the losses of its steps."""
    names = ("steps", "rows", "micro_batch_size", "width", "layers")
    case = {"corpus": str(corpus)} | {name: getattr(flags, name) for name in names}
    results: dict[str, dict[str, Any]] = {}
    for turn in range(flags.repeats):
        for name, (ranks, changes) in flags.runs().items():
            print(f"turn {turn + 1} of {flags.repeats}: {name}", file=sys.stderr, flush=True)
            seen = launch(ranks, case | changes)
            known = results.setdefault(name, seen)
            for key in ("cpu_ms", "wall_ms"):
                known[key] = min(known[key], seen[key])
    return results


def report_of(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios."""

    def ratio(name: str, base: str, key: str = "cpu_ms") -> float:
        return float(results[name][key] / results[base][key])

    layouts = ("dp2", "tp2", "pp2")
    whole = [result for name, result in results.items() if name.startswith("global")]
    base = results["global"]
    differences = [
        abs(result[loss][0] - base[loss][0]) / abs(base[loss][0])
        for result in whole
        for loss in ("generation", "contrastive")
    ]
    return {
        "scope_time_ratio": ratio("global", "micro_batch"),
        "keep_graphs_time_ratio": ratio("global_keep_graphs", "micro_batch"),
        "one_micro_batch_ratio": ratio("global_one_micro_batch", "one_micro_batch"),
        "layout_ratio": {layout: ratio(f"global_{layout}", "global") for layout in layouts},
        "layout_wall_ratio": {layout: ratio(f"global_{layout}", "global", "wall_ms") for layout in layouts},
        "loss_difference": max(differences),
        "runs": results,
    }


def main() -> None:
    """Read the flags, make or open the corpus, run, print."""
    flags = tyro.cli(Flags, description=__doc__)
    if flags.quick:
        flags = dataclasses.replace(flags, steps=1, repeats=1, rows=4, layers=1)
    with tempfile.TemporaryDirectory(prefix="scopes-") as folder:
        corpus = Path(flags.data_path) if flags.data_path else SyntheticCorpus(400, 96).write(Path(folder) / "data")
        report = report_of(measure(flags, corpus))
    for name, result in report["runs"].items():
        print(f"{name:24} {result['cpu_ms']:9,.1f} ms processor  {result['wall_ms']:9,.1f} ms wall")
    print(json.dumps(report | dataclasses.asdict(flags) | {"torch_version": torch.__version__}))


if __name__ == "__main__":
    main()
