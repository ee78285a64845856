"""Memory, bytes and time of the contrastive loss alone: ours, open_clip's with local loss, and the full matrix.

python benchmarks/contrastive.py                 2,048 pairs on each of 2 to 32 ranks, D = 768
python benchmarks/contrastive.py --quick         seconds, at sizes that say nothing

How. One rank of many is run, on one thread, in a new process for every measurement: torch's fake process group stands
for the others, whose features are made up (``counted_wire.py``). So:

- *bytes* are counted, not moved: what this rank has to send in the forward and the backward pass;
- *time* is processor time of loss and gradient without any network and without making up features. The losses take
  turns (A B A B ...) and the least of all repetitions counts, for others may be using the machine;
- *memory* is the largest resident size (VmHWM, forgotten through /proc/self/clear_refs just before) minus what was
  resident before: gathered features, scores, gradients.

All are ``lcl_megatron.parallel.contrastive.contrastive_loss`` or open_clip's ``ClipLoss`` with ``gather_with_grad``;
``local_loss`` computes this rank's rows of the matrix in both directions, otherwise every rank computes all of it.
First, two real ranks over gloo compute all three: values and gradients must agree, and the bytes must be those that a
rank of two that do not exist counts. The last line is one JSON object; ``memory_ratio`` and ``time_ratio`` are ours
over open_clip's local loss at the largest size, ``backward_feature_bytes`` what ours sends in its backward pass.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library

RANK = Path(__file__).with_name("contrastive_rank.py")
OURS, LOCAL, FULL = "ours", "open_clip_local", "open_clip_full"
REAL = {"local_pairs": 64, "ranks": 2, "width": 32, "tile": 40}
"""What two real ranks compute; the tile does not divide the pairs."""
LEAST = ("peak_mib", "cpu_s", "forward_cpu_s", "kernel_s")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is measured."""

    sizes: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    """Pairs of all ranks together."""
    local_pairs: int = 2048
    """Pairs of one rank."""
    width: int = 768
    """Channels D of the features."""
    tile: int = 4096
    """Columns that exist at one time in ours."""
    repeats: int = 3
    """Measurements of each loss at each size."""
    full_matrix_up_to: int = 8192
    """Most pairs for which the full matrix, of N x N scores on every rank, is computed."""
    quick: bool = False
    """Two small sizes, once each; for tests."""

    def __post_init__(self) -> None:
        wrong = [size for size in self.sizes if size % self.local_pairs or size < 2 * self.local_pairs]
        if wrong or not self.sizes or self.repeats < 1:
            raise ValueError(
                f"sizes {list(self.sizes)} with {self.repeats} repeats: expected multiples of {self.local_pairs} "
                f"pairs of one rank, for two ranks or more, and at least one repeat; {wrong} do not fit"
            )


def start(case: dict[str, Any]) -> subprocess.Popen[str]:
    """Start a rank."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = [str(RANK.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.Popen(
        [sys.executable, str(RANK), json.dumps(case)], stdout=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a rank printed.

    Raises:
        RuntimeError: it failed; what it said is on standard error.
    """
    output = process.communicate()[0]
    if process.returncode:
        raise RuntimeError(f"a rank ended with status {process.returncode}: {' '.join(map(str, process.args))}")  # type: ignore[arg-type]
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    return report


def agreement() -> dict[str, Any]:
    """Compare all losses on two real ranks, and their bytes with those of one rank of two that do not exist."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [start(REAL | {"rank": rank, "store": f"{folder}/store"}) for rank in range(REAL["ranks"])]
        reports = [finish(rank) for rank in ranks]
    same = True
    for loss in (OURS, LOCAL, FULL):
        fake = finish(start(REAL | {"loss": loss}))
        same &= all(report[loss][key] == fake[key] for report in reports for key in ("forward_bytes", "backward_bytes"))
    return {
        "value_difference": max(report[loss]["value_difference"] for report in reports for loss in (LOCAL, FULL)),
        "gradient_difference": max(report[loss]["gradient_difference"] for report in reports for loss in (LOCAL, FULL)),
        "bytes_as_on_real_ranks": same,
    }


def rows_of(size: int, flags: Flags) -> list[dict[str, Any]]:
    """Measure all losses at one size, in turn; return one row each, of nulls for what was not computed."""
    losses = [LOCAL, OURS, *([FULL] if size <= flags.full_matrix_up_to else [])]
    case = {
        "local_pairs": flags.local_pairs,
        "ranks": size // flags.local_pairs,
        "width": flags.width,
        "tile": flags.tile,
    }
    reports: dict[str, list[dict[str, Any]]] = {loss: [] for loss in losses}
    for _ in range(flags.repeats):
        for loss in losses:
            reports[loss].append(finish(start(case | {"loss": loss})))
    rows = []
    for loss in (OURS, LOCAL, FULL):
        first = reports[loss][0] if loss in reports else dict.fromkeys(reports[OURS][0])
        least = {key: min(report[key] for report in reports[loss]) for key in LEAST} if loss in reports else {}
        all_s = {"all_cpu_s": [report["cpu_s"] for report in reports[loss]]} if loss in reports else {}
        rows.append({"pairs": size, "ranks": case["ranks"], "loss": loss} | first | least | all_s)
        print_row(rows[-1])
    return rows


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    begin = f"{row['pairs']:>7,} pairs {row['ranks']:>3} ranks  {row['loss']:15} "
    if row["peak_mib"] is None:
        print(f"{begin} not computed", flush=True)
        return
    print(
        f"{begin} {row['peak_mib']:>8,.0f} MiB  {row['cpu_s']:>7.2f} s ({row['kernel_s']:.2f} in the kernel)  "
        f"sent {row['forward_bytes'] / 2**20:>7,.1f} + {row['backward_bytes'] / 2**20:>7,.1f} MiB",
        flush=True,
    )


def ratio(ours: float, other: float) -> float | None:
    """Return how many times the other ours is, to three digits; None where the other is too small to be seen."""
    return round(ours / other, 3) if other > 0 else None


def main() -> None:
    """Read the flags, compare, measure, print."""
    flags = tyro.cli(Flags, description=__doc__)
    if flags.quick:
        flags = dataclasses.replace(
            flags, sizes=(1024, 2048), local_pairs=512, width=64, tile=96, repeats=1, full_matrix_up_to=1024
        )
    try:
        stock_library("open_clip")
    except LibraryError as error:
        print(f"{error}; nothing was measured")
        print(json.dumps({"skipped": "no open_clip"}))
        return
    agreed = agreement()
    print(", ".join(f"{name} {value}" for name, value in agreed.items()) + " (two gloo ranks)", flush=True)
    rows = [row for size in sorted(flags.sizes) for row in rows_of(size, flags)]
    ours, local, _ = rows[-3:]
    values = {size: [r["value"] for r in rows if r["pairs"] == size and r["loss"] != FULL] for size in flags.sizes}
    report = {
        "memory_ratio": ratio(ours["peak_mib"], local["peak_mib"]),
        "time_ratio": ratio(ours["cpu_s"], local["cpu_s"]),
        "time_ratio_without_kernel": ratio(ours["cpu_s"] - ours["kernel_s"], local["cpu_s"] - local["kernel_s"]),
        "backward_feature_bytes": sum(row["backward_bytes"] for row in rows if row["loss"] == OURS),
        "sent_ratio": ratio(*(row["forward_bytes"] + row["backward_bytes"] for row in (ours, local))),
        "value_difference_at_size": max(abs(a - b) / abs(b) for a, b in values.values()),
        **agreed,
        "rows": rows,
    }
    for name in ("memory_ratio", "time_ratio", "time_ratio_without_kernel", "sent_ratio"):
        print(f"{name} {report[name]}")
    print(json.dumps(report | dataclasses.asdict(flags) | {"torch_version": torch.__version__}))


if __name__ == "__main__":
    main()
