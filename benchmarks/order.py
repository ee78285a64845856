"""Whether a run reads the same rows, whatever its layout: rows, tokens, crops.

python benchmarks/order.py [--rows 5000]

Reads so many rows through the real loader for 1, 2, 3 and 8 data-parallel ranks and for 0, 1, 2 and 5 workers; other
runs stop at random steps and go on with another layout. Every row is reduced to a hash of its tokens, labels,
positions, image keys and pixels. The last line is one JSON object: ``runs`` how many runs were compared, ``identical``
how many of them read, step by step, exactly the rows of the first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from synthetic import SyntheticCorpus

from lcl_megatron.config import DataConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.storage.corpus import Corpus

LATENTS = 16
IMAGE_SIZE = 64
BATCH = 24
LAYOUTS = ((1, 0, 4), (2, 1, 3), (3, 2, 2), (8, 5, 1), (1, 5, 24), (2, 2, 12), (8, 0, 3))
"""Data-parallel ranks, workers, micro-batch size."""


def rows_of(batch: PackedBatch) -> list[bytes]:
    """Return a hash of every row of a micro-batch."""
    length = batch.tokens.shape[1]
    row_of_image = batch.image_slots // length
    hashes = []
    for row in range(len(batch.tokens)):
        here = (row_of_image == row).nonzero()[:, 0]
        parts = [batch.tokens[row], batch.labels[row], batch.position_ids[row], batch.image_keys[here]]
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts))
        assert batch.images is not None
        digest.update(batch.images[here].numpy().tobytes())
        hashes.append(digest.digest())
    return hashes


def read(corpus: Corpus, first: int, rows: int, layout: tuple[int, int, int], batch: int) -> list[bytes]:
    """Return what the steps of all ranks read, sorted within each step, from row ``first`` on."""
    ranks, workers, micro_batch = layout
    config = DataConfig(data_path=(str(corpus.path),), seq_length=512, num_workers=workers)
    plan = Plan([corpus], config, LATENTS, batch, micro_batch, ranks, seed=1)
    steps = -(-rows // batch)
    read_by_step: list[list[bytes]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        loader = StepLoader(plan, rank, IMAGE_SIZE, consumed_rows=first, end_step=steps)
        for number, step in enumerate(loader):
            read_by_step[number] += [digest for micro in step.micro_batches for digest in rows_of(micro)]
    return [digest for step in read_by_step for digest in sorted(step)]


def resumed(corpus: Corpus, rows: int, seed: int) -> list[bytes]:
    """Return what a run reads that stops at a random step and goes on with another layout, again and again."""
    rng = np.random.default_rng(seed)
    found: list[bytes] = []
    while len(found) < rows:
        layout = LAYOUTS[rng.integers(len(LAYOUTS))]
        count = BATCH * int(rng.integers(1, 60))
        found += read(corpus, len(found), min(count, -(-(rows - len(found)) // BATCH) * BATCH), layout, BATCH)
    return found


def main() -> None:
    """Read the flags, compare all runs, print lines and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000, help="rows of each run")
    parser.add_argument("--resumed", type=int, default=3, help="runs that are interrupted")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus.open(SyntheticCorpus(600, 48).write(Path(folder) / "data"))
        runs = {f"{r} ranks, {w} workers, micro-batch {m}": (r, w, m) for r, w, m in LAYOUTS}
        found = {name: read(corpus, 0, flags.rows, layout, BATCH) for name, layout in runs.items()}
        found |= {f"interrupted, seed {seed}": resumed(corpus, flags.rows, seed) for seed in range(flags.resumed)}
    expected = next(iter(found.values()))
    identical = {name: rows == expected for name, rows in found.items()}
    for name, same in identical.items():
        print(f"{name}: {'identical' if same else 'DIFFERENT'}")
    report = {"runs": len(found), "identical": sum(identical.values()), "rows": len(expected)}
    print(json.dumps({**report, "different_rows": len(set(expected))}))


if __name__ == "__main__":
    main()
