"""What a checkpoint costs a run: how long training waits, when it is on disk, how long it takes to verify and to load.

python benchmarks/checkpoints.py [--preset vit_b16_opt125m] [--folder scratch] [--no-baseline]

One process holds the whole model of a preset, with random weights; nothing is trained. The baseline is megatron-core's
own saving (``dist_checkpointing``, in place, no manifest) of the same tensors, for which training waits. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.folders import Progress, step_folder
from lcl_megatron.checkpoint.held import held_weights
from lcl_megatron.checkpoint.manifest import verify
from lcl_megatron.checkpoint.optimizer_state import held_state
from lcl_megatron.checkpoint.saver import Saver
from lcl_megatron.config import CheckpointConfig
from lcl_megatron.config.sources import load_run_config
from lcl_megatron.model.initialization import count_parameters
from lcl_megatron.parallel import engine as engines
from lcl_megatron.training.optimizer import build_optimizer, build_scheduler

VOCAB_SIZE = "50304"


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def build(preset: str) -> native.Trainable:
    """Return a model of a preset with its optimizer, on this process alone."""
    config = load_run_config(["--preset", preset, "--language.vocab-size", VOCAB_SIZE, "--transformer-impl", "torch"])
    engine = engines.build_engine(config, engines.start(config))
    optimizer = build_optimizer(engine)
    return native.Trainable(engine, optimizer, build_scheduler(config, optimizer))


def measure(trainable: native.Trainable, folder: Path, repeats: int) -> dict[str, float]:
    """Save some times, then verify and load the last one.

    Args:
        trainable: what is saved.
        folder: for the checkpoints; only the last stays.
        repeats: saves that count, after one that fills memory for the first time.
    """
    groups = trainable.engine.groups
    saver = Saver(CheckpointConfig(save=str(folder), on_save_error="stop"), groups, "benchmark", lease=None)
    waits, durable = [], []
    for step in range(repeats + 1):
        progress = Progress(step=step)
        begin = time.perf_counter()
        saver.begin(step, lambda progress=progress: native.files(trainable, progress, b"tokenizer"))  # type: ignore[misc]
        waits.append(time.perf_counter() - begin)
        saver.finish()
        durable.append(time.perf_counter() - begin)
        if step:
            shutil.rmtree(step_folder(folder, step - 1))
    saver.close()
    last = step_folder(folder, repeats)
    size = sum(file.stat().st_size for file in last.iterdir())
    return {
        "gigabytes": size / 1e9,
        "first_wait_s": waits[0],
        "wait_s": min(waits[1:]),
        "durable_s": min(durable[1:]),
        "verify_s": seconds(lambda: verify(last)),
        "load_s": seconds(lambda: native.load(last, trainable, verify=False)),
    }


def baseline(trainable: native.Trainable, folder: Path) -> float:
    """Return for how many seconds megatron-core's own saving of the same tensors keeps training waiting."""
    # Here, behind the package, which silences what megatron-core says when it is imported.
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    model = native.model_state(trainable.engine)
    held = [*held_weights(model), *held_state(trainable.optimizer, model)]
    tensors = {one.name: ShardedTensor.from_rank_offsets(one.name, one.tensor.reshape(one.region.size)) for one in held}
    folder.mkdir()
    return seconds(lambda: dist_checkpointing.save(tensors, str(folder)))


def main() -> None:
    """Read the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="vit_b16_opt125m")
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; default: a temporary one")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    flags = parser.parse_args()
    logging.getLogger("lcl_megatron").setLevel(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=flags.folder) as scratch:
        trainable = build(flags.preset)
        try:
            parameters = sum(map(count_parameters, trainable.engine.models))
            report: dict[str, Any] = {"preset": flags.preset, "parameters_m": parameters / 1e6}
            report |= measure(trainable, Path(scratch) / "ours", flags.repeats)
            shutil.rmtree(Path(scratch) / "ours")
            if flags.baseline:
                report["megatron_core_wait_s"] = baseline(trainable, Path(scratch) / "megatron_core")
        finally:
            trainable.engine.groups.destroy()
    for name, value in report.items():
        print(f"{name:20} {value:,.3f}" if isinstance(value, float) else f"{name:20} {value}")
    print(json.dumps(report))


# megatron-core's saver starts a process that imports this file again.
if __name__ == "__main__":
    main()
