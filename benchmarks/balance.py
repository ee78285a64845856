"""How even the images of a step are over data-parallel ranks, with and without dealing.

python benchmarks/balance.py --data-path corpus --ranks 64 --rows-per-rank 32

In synchronous training all ranks wait for the one with most images. The last line is one JSON object: ``max_over_mean``
is the largest number of images of a rank over the mean, the worst of all steps; ``max_over_mean_undealt`` what it would
be if every rank took its rows as they come; ``mean_max_over_mean`` and ``mean_max_over_mean_undealt`` are means over
the steps.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from lcl_megatron.config import DataConfig
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.storage.corpus import Corpus


def measure(plan: Plan, steps: int) -> dict[str, float]:
    """Return the figures over the first steps."""
    dealt, undealt, micro = [], [], []
    for number in range(steps):
        step = plan.step(number)
        per_rank = step.layout.num_images.sum(axis=0)
        images = plan.sequence.read(step.first_row, plan.global_batch_size).counts.num_images
        as_they_come = images.reshape(plan.data_parallel_size, -1).sum(axis=1)
        dealt.append(per_rank.max() / per_rank.mean())
        undealt.append(as_they_come.max() / as_they_come.mean())
        micro.append(step.layout.num_images.max() / step.layout.num_images.mean())
    return {
        "max_over_mean": float(np.max(dealt)),
        "max_over_mean_undealt": float(np.max(undealt)),
        "mean_max_over_mean": float(np.mean(dealt)),
        "mean_max_over_mean_undealt": float(np.mean(undealt)),
        "micro_batch_max_over_mean": float(np.max(micro)),
        "images_per_rank": float(per_rank.mean()),
    }


def main() -> None:
    """Read the flags, measure, print a line and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, nargs="+", help="folders of preprocessed corpora")
    parser.add_argument("--ranks", type=int, default=64, help="data-parallel ranks")
    parser.add_argument("--rows-per-rank", type=int, default=32, help="rows of a step on each rank")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="rows of a micro-batch")
    parser.add_argument("--num-latents", type=int, default=196, help="latents per image")
    parser.add_argument("--steps", type=int, default=50, help="steps to look at")
    flags = parser.parse_args()
    corpora = [Corpus.open(path) for path in flags.data_path]
    config = DataConfig(data_path=tuple(flags.data_path))
    rows = flags.ranks * flags.rows_per_rank
    plan = Plan(corpora, config, flags.num_latents, rows, flags.micro_batch_size, flags.ranks, seed=0)
    result = measure(plan, flags.steps)
    print(
        f"{flags.ranks} ranks of {flags.rows_per_rank} rows, {result['images_per_rank']:.1f} images each: "
        f"the fullest has {result['max_over_mean']:.3f} times the mean "
        f"({result['max_over_mean_undealt']:.3f} as rows come), the worst of {flags.steps} steps"
    )
    print(json.dumps({**result, "ranks": flags.ranks, "rows_per_rank": flags.rows_per_rank, "steps": flags.steps}))


if __name__ == "__main__":
    main()
