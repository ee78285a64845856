"""Whole training steps on one CPU process: loader, agreement, forward, backward, optimizer.

python benchmarks/step_cpu.py                                  a synthetic corpus, a small model
python benchmarks/step_cpu.py --data-path CORPUS --profile     a corpus of your own, and where the time goes

Prints one line per figure and, last, one JSON object. Medians over the measured steps; on a shared machine, trust
``cpu_ms`` (processor time of this process) more than ``step_ms`` (wall time).
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from synthetic import SyntheticCorpus

from lcl_megatron.config import (
    DataConfig,
    LanguageConfig,
    LoggingConfig,
    OptimizerConfig,
    PoolConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from lcl_megatron.training.flops import layout_flops
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is measured."""

    data_path: str = ""
    """Folder of a preprocessed corpus; empty = a synthetic one."""
    steps: int = 10
    """Measured steps."""
    warmup_steps: int = 2
    """Steps before them."""
    rows: int = 8
    """Rows of the global batch."""
    micro_batch_size: int = 4
    """Rows of one forward pass."""
    seq_length: int = 512
    """Tokens of a row."""
    image_size: int = 96
    """Side of the images, in pixels."""
    patch_size: int = 16
    """Side of a patch, in pixels."""
    vision_layers: int = 4
    """Layers of the vision tower."""
    vision_width: int = 192
    """Width of the vision tower."""
    language_layers: int = 4
    """Layers of the language model."""
    language_width: int = 192
    """Width of the language model."""
    drop_path_rate: float = 0.1
    """Stochastic depth of the vision tower's last layer."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """dtype of parameters and activations."""
    num_workers: int = 0
    """Loader processes."""
    threads: int = 1
    """torch threads."""
    picture_side: int = 256
    """Width of the synthetic pictures before they are resized, in pixels."""
    profile: bool = False
    """Print the operations that take the most processor time."""

    def config(self, corpus: Path) -> RunConfig:
        """Return the run that is measured; MLPs are four times as wide, heads have 64 channels."""
        return RunConfig(
            vision=VisionConfig(
                image_size=self.image_size,
                patch_size=self.patch_size,
                num_layers=self.vision_layers,
                hidden_size=self.vision_width,
                ffn_hidden_size=4 * self.vision_width,
                num_attention_heads=max(1, self.vision_width // 64),
                drop_path_rate=self.drop_path_rate,
            ),
            pool=PoolConfig(num_attention_heads=max(1, self.language_width // 64)),
            language=LanguageConfig(
                num_layers=self.language_layers,
                hidden_size=self.language_width,
                ffn_hidden_size=4 * self.language_width,
                num_attention_heads=max(1, self.language_width // 64),
                max_position_embeddings=self.seq_length,
            ),
            data=DataConfig(data_path=(str(corpus),), seq_length=self.seq_length, num_workers=self.num_workers),
            training=TrainingConfig(
                train_iters=self.warmup_steps + self.steps,
                global_batch_size=self.rows,
                micro_batch_size=self.micro_batch_size,
                precision=self.precision,
                transformer_impl="torch",
            ),
            optimizer=OptimizerConfig(lr_warmup_iters=0),
            logging=LoggingConfig(log_interval=1_000_000),
        )


def measure(run: Run, flags: Flags) -> dict[str, float]:
    """Run all steps; return the medians of those behind the warm-up."""
    walls, cpus, waits, images, tokens, flops = [], [], [], [], [], []
    batches = iter(run.loader)
    for step in range(flags.warmup_steps + flags.steps):
        wall, cpu = time.perf_counter(), time.process_time()
        batch = next(batches)
        wait = time.perf_counter() - wall
        train_step(run, batch)
        if step >= flags.warmup_steps:
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            waits.append(wait)
            images.append(int(batch.layout.num_images.sum()))
            tokens.append(batch.layout.num_tokens)
            flops.append(layout_flops(run.config, batch.layout))
    step_s = statistics.median(walls)
    return {
        "images_per_s": statistics.mean(images) / step_s,
        "tokens_per_s": statistics.mean(tokens) / step_s,
        "step_ms": 1000 * step_s,
        "cpu_ms": 1000 * statistics.median(cpus),
        "data_ms": 1000 * statistics.median(waits),
        "images_per_step": statistics.mean(images),
        "tokens_per_step": statistics.mean(tokens),
        "fill": statistics.mean(tokens) / (flags.rows * flags.seq_length),
        "gflops_per_s": statistics.mean(flops) / step_s / 1e9,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def profiled(run: Run, flags: Flags) -> tuple[dict[str, float], str]:
    """Measure under torch's profiler; return the figures and a table of operations by their own processor time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = measure(run, flags)
    return result, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)


def main() -> None:
    """Read the flags, make or open the corpus, measure, print."""
    flags = tyro.cli(Flags, description=__doc__)
    torch.set_num_threads(flags.threads)
    with tempfile.TemporaryDirectory(prefix="step-cpu-") as folder:
        corpus = (
            Path(flags.data_path)
            if flags.data_path
            else SyntheticCorpus(400, flags.picture_side).write(Path(folder) / "data")
        )
        with run_from(flags.config(corpus)) as run:
            result, table = profiled(run, flags) if flags.profile else (measure(run, flags), "")
    if table:
        print(table)
    for name, value in result.items():
        print(f"{name:16} {value:,.2f}")
    report: dict[str, Any] = result | dataclasses.asdict(flags) | {"torch_version": torch.__version__}
    sys.stdout.flush()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
