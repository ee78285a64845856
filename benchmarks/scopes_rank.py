"""One rank of a few training steps; ``scopes.py`` starts it with torchrun.

Writes FOLDER/RANK.json: processor and wall time of every measured step, and this rank's share of its losses.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from step_cpu import Flags

from lcl_megatron.config import LossConfig, ParallelConfig, RunConfig
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run."""

    corpus: str
    """Folder of a preprocessed corpus."""
    folder: str
    """Where every rank writes what it has seen."""
    steps: int
    """Measured steps, behind one that is not."""
    rows: int
    """Rows of the global batch."""
    micro_batch_size: int
    """Rows of one forward pass."""
    width: int
    """Width of both towers."""
    layers: int
    """Layers of both towers."""
    scope: Literal["micro_batch", "global"] = "micro_batch"
    """Which pairs are contrasted with each other."""
    keep_graphs: bool = False
    """Whether activations of all micro-batches are kept instead of a second forward pass."""
    tensor: int = 1
    """Tensor-parallel ranks."""
    pipeline: int = 1
    """Pipeline stages."""

    def config(self) -> RunConfig:
        """Return the run; images and rows are small, so that it takes seconds."""
        base = Flags(
            steps=self.steps,
            warmup_steps=1,
            rows=self.rows,
            micro_batch_size=self.micro_batch_size,
            seq_length=256,
            image_size=64,
            vision_layers=self.layers,
            vision_width=self.width,
            language_layers=self.layers,
            language_width=self.width,
        ).config(Path(self.corpus))
        return dataclasses.replace(
            base,
            loss=LossConfig(contrastive_scope=self.scope, contrastive_keep_graphs=self.keep_graphs),
            parallel=ParallelConfig(tensor_model_parallel_size=self.tensor, pipeline_model_parallel_size=self.pipeline),
        )


def run_steps(case: Case) -> dict[str, list[float]]:
    """Return times of the measured steps, without the loader, and this rank's share of every step's losses."""
    report: dict[str, list[float]] = {"cpu_s": [], "wall_s": [], "generation": [], "contrastive": []}
    with run_from(case.config()) as run:
        # Tensor-parallel ranks compute the same losses; one of them reports.
        reports = run.engine.groups.tp_rank == 0
        for number, batch in enumerate(run.loader):
            cpu, wall = time.process_time(), time.perf_counter()
            losses = train_step(run, batch).losses
            if number:
                report["cpu_s"].append(time.process_time() - cpu)
                report["wall_s"].append(time.perf_counter() - wall)
            report["generation"].append(sum(float(loss.generation_loss) for loss in losses if reports))
            report["contrastive"].append(sum(float(loss.contrastive_loss) for loss in losses if reports))
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = Case(**json.loads(sys.argv[1]))
    text = json.dumps(run_steps(asked))
    (Path(asked.folder) / f"{os.environ['RANK']}.json").write_text(text, encoding="ascii")
