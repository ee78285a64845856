"""Runs all benchmarks that need no GPU and writes their figures into docs/BENCHMARKS.md.

python benchmarks/run_all.py --data-path corpus [--folder scratch] [--only packing plan]

Without ``--data-path`` a synthetic corpus is made. ``--folder`` needs 10 GB for the index of the plan benchmark. The
last line is one JSON object with the last line of every benchmark.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from synthetic import SyntheticCorpus

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "BENCHMARKS.md"
BEGIN, END = "<!-- begin: make bench -->", "<!-- end: make bench -->"


@dataclass(frozen=True)
class Benchmark:
    """A script and the figures of it that stand in the table."""

    script: str
    """File in this folder, without its suffix."""
    figures: dict[str, str]
    """What each key of its JSON object means."""
    arguments: tuple[str, ...] = ()
    """Flags; ``CORPUS`` and ``FOLDER`` stand for the corpus and a scratch folder."""


BENCHMARKS = (
    Benchmark(
        "packing",
        {
            "fill": "share of positions that hold a document",
            "fill_one_per_row": "the same with one document per row",
            "documents_per_s": "documents planned per second, one core",
        },
        ("--data-path", "CORPUS"),
    ),
    Benchmark(
        "plan",
        {
            "startup_s": "first start with 100 million documents, s",
            "startup_gib": "its peak memory, GiB",
            "cached_s": "later starts, s",
            "row_ms": "a row at a random position, ms",
            "step_ms": "a step of 2,048 rows at a random position, ms",
        },
        ("--folder", "FOLDER"),
    ),
    Benchmark(
        "images",
        {
            "speedup_256": "decoding, times Pillow with OpenCLIP's transform, 256 px",
            "speedup_512": "512 px",
            "speedup_1024": "1,024 px",
            "max_abs_diff": "largest difference from Pillow's resize where sides shrink, of 255",
            "max_abs_diff_enlarged": "the same where a side is enlarged",
            "dali_cpu_mean_diff": "mean difference of DALI's CPU operators, of 255",
            "end_to_end_speedup_256": "read, decode, compose, collate; times webdataset with Pillow, 256 px",
            "end_to_end_speedup_512": "512 px",
            "end_to_end_speedup_1024": "1,024 px",
            "end_to_end_speedup": "their median",
        },
    ),
    Benchmark(
        "preprocess",
        {
            "documents_per_s_core": "documents preprocessed per core-second",
            "images_per_s_core": "images per core-second",
            "scaling_2": "speed of two processes over one",
        },
    ),
    Benchmark(
        "balance",
        {
            "max_over_mean": "images of the fullest of 64 ranks over the mean, worst step",
            "max_over_mean_undealt": "the same with rows as they come",
        },
        ("--data-path", "CORPUS"),
    ),
    Benchmark(
        "mixture",
        {"max_share_error": "largest error of a share in 1,000 rows (pairs and documents, 1:1 by images)"},
        ("--data-path", "CORPUS", "CORPUS", "--view", "pairs", "interleaved", "--weights", "1", "1"),
    ),
    Benchmark("order", {"runs": "runs of 5,000 rows: layouts, workers, resumed", "identical": "of them identical"}, ()),
    Benchmark(
        "fuzz_images",
        {
            "images": "damaged images read by the loader",
            "crashes": "crashes",
            "hangs": "hangs",
            "others_unchanged": "all other samples are the same",
            "counted": "every undecodable one is counted and named",
            "rss_above_idle_mb": "memory above idle, MB",
        },
    ),
    Benchmark(
        "activations",
        {
            "vision_mask_none_mib": "ViT-B/16, bf16: kept for the backward pass, MiB per image",
            "vision_mask_selective_mib": "with recompute_granularity selective",
            "vision_mask_full_mib": "with full",
            "vision_subset_none_mib": "with drop_path_mode subset, 8 images, rate 0.2",
            "vision_subset_none_flops": "its operations, of those of mask",
            "language_none_mib": "OPT-125M, bf16: MiB per row of 2,048 tokens",
            "language_selective_mib": "with recompute_granularity selective",
            "language_full_mib": "with full",
        },
    ),
    Benchmark(
        "checkpoints",
        {
            "gigabytes": "checkpoint of ViT-B/16 with OPT-125M on one process, GB",
            "wait_s": "how long training waits for it, s",
            "durable_s": "until it is complete on disk, s",
            "verify_s": "comparing all files with the manifest, one process, s",
            "load_s": "loading it, s",
            "megatron_core_wait_s": "how long training waits for megatron-core's own saving of the same tensors, s",
        },
        ("--folder", "FOLDER"),
    ),
    Benchmark(
        "contrastive",
        {
            "memory_ratio": "memory of the contrastive loss over open_clip's local loss, 65,536 pairs on 32 ranks",
            "time_ratio": "its processor time over open_clip's",
            "sent_ratio": "bytes that a rank sends over open_clip's",
            "backward_feature_bytes": "bytes that a rank sends in the backward pass",
            "gradient_difference": "largest difference of a gradient from open_clip's, two real ranks",
        },
    ),
    Benchmark(
        "scopes",
        {
            "scope_time_ratio": "step with scope `global` over `micro_batch`, eight micro-batches",
            "keep_graphs_time_ratio": "the same with activations kept",
            "one_micro_batch_ratio": "the same with one micro-batch",
        },
        ("--data-path", "CORPUS"),
    ),
    Benchmark("preprocess_kills", {"kills": "kills", "corpora": "corpora", "identical": "of them identical"}),
)


def run(benchmark: Benchmark, corpus: Path, folder: Path) -> dict[str, Any]:
    """Run a benchmark, its output passed on; return the JSON object of its last line."""
    places = {"CORPUS": str(corpus), "FOLDER": str(folder)}
    arguments = [places.get(argument, argument) for argument in benchmark.arguments]
    print(f"\n{benchmark.script}.py {' '.join(arguments)}", flush=True)
    begin = time.perf_counter()
    command = [sys.executable, str(ROOT / "benchmarks" / f"{benchmark.script}.py"), *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(output, end="")
    print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
    report: dict[str, Any] = json.loads(output.splitlines()[-1])
    return report


def table(reports: dict[str, dict[str, Any]], corpus: str) -> str:
    """Return the Markdown table of all figures."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = [
        f"Commit {commit.strip() or 'unknown'}, {datetime.now(UTC):%Y-%m-%d}, {processor()}; {corpus}.",
        "",
        "| benchmark | figure | key | value |",
        "|---|---|---|---:|",
    ]
    for benchmark in BENCHMARKS:
        for key, meaning in benchmark.figures.items():
            value = reports.get(benchmark.script, {}).get(key)
            lines.append(f"| `{benchmark.script}.py` | {meaning} | `{key}` | {number(value)} |")
    return "\n".join(lines)


def number(value: Any) -> str:
    """Return a figure as it stands in a table: four digits, thousands apart."""
    if value is None:
        return "not yet run"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def processor() -> str:
    """Return what the machine computes with."""
    path = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", path.read_text()) if path.is_file() else []
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def main() -> None:
    """Run, print, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, help="folder of a preprocessed corpus; default: a synthetic one")
    parser.add_argument("--folder", type=Path, help="scratch folder; default: a temporary one")
    parser.add_argument(
        "--only", nargs="+", choices=[b.script for b in BENCHMARKS], help="run only these; write nothing"
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary)
        corpus, name = flags.data_path, f"corpus `{flags.data_path and flags.data_path.name}`"
        if corpus is None:
            corpus = SyntheticCorpus(4000, 40, mean_sentences=16).write(Path(temporary) / "synthetic")
            name = "synthetic corpus of 4,000 documents"
        chosen = [b for b in BENCHMARKS if flags.only is None or b.script in flags.only]
        reports = {benchmark.script: run(benchmark, corpus, folder) for benchmark in chosen}
    if flags.only is None:
        text = TABLE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        TABLE.write_text(f"{before}{BEGIN}\n{table(reports, name)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
        print(f"wrote {TABLE.relative_to(ROOT)}")
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
