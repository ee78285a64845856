"""Runs that go on with other numbers of ranks: the same tensors, the same rows in the same steps.

A run is trained for some steps in one layout, stops, and goes on in another, which then stops and goes on in a third.
Weights and moments are put together without the code that stores them, from what each rank holds, before and after.
Rows are compared with those of one undisturbed process.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos.findings import Findings
from benchmarks.chaos.launcher import row_digests
from benchmarks.chaos.processes import call_in_child, call_on_ranks
from benchmarks.chaos.small_run import DP2, DP2_PP2, DP2_TP2, ONE, PP2, TP2, TP2_PP2, Layout, make_corpus, small_config
from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.held import held_weights
from lcl_megatron.checkpoint.optimizer_state import held_state
from lcl_megatron.checkpoint.shard_file import Region
from lcl_megatron.config import RunConfig
from lcl_megatron.training.loop import train
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from

LANE = "elastic"
STEPS = 12
LAYOUTS = (ONE, DP2, TP2, PP2, DP2_TP2, DP2_PP2, TP2_PP2)
CHANGES = 2
"""How often a run changes its layout."""


def run(seed: int, cases: list[int], folder: Path) -> Findings:
    """Let runs go on in other layouts.

    Args:
        seed: of the campaign.
        cases: numbers of the cases.
        folder: scratch.
    """
    findings = Findings(LANE, seed)
    corpus = call_in_child(make_corpus, folder / "data")
    expected = call_on_ranks(_train, 1, small_config(corpus, ONE, training={"train_iters": STEPS}))[0]
    for number in cases:
        layouts, stops = draw(seed, number)
        problems = _case(layouts, stops, corpus, folder / f"case-{number}", expected["rows"])
        names = " -> ".join(layout.name for layout in layouts)
        findings.cases.append({"case": number, "layouts": names, "stops": stops, "problems": problems})
        if problems:
            findings.fail(number, f"{names}, at steps {stops}: {'; '.join(problems)}")
    findings.figures = {
        "cases": len(cases),
        "changes": CHANGES * len(cases),
        "as_promised": sum(not case["problems"] for case in findings.cases),
    }
    return findings


def draw(seed: int, number: int) -> tuple[list[Layout], list[int]]:
    """Return the layouts of a case, each another than the one before, and the steps at which it changes."""
    rng = random.Random(f"{seed}/{LANE}/{number}")
    layouts = [LAYOUTS[number % len(LAYOUTS)]]
    for _ in range(CHANGES):
        layouts.append(rng.choice([layout for layout in LAYOUTS if layout is not layouts[-1]]))
    return layouts, sorted(rng.sample(range(1, STEPS), CHANGES))


def _case(
    layouts: list[Layout], stops: list[int], corpus: Path, folder: Path, expected: dict[int, Counter[str]]
) -> list[str]:
    """Train in one layout after the other; return what is not as it must be."""
    problems, rows, before = [], {}, None
    for layout, stop in zip(layouts, [*stops, STEPS], strict=True):
        config = small_config(
            corpus,
            layout,
            training={"train_iters": STEPS},
            checkpoint={"save": str(folder / "save"), "save_interval": STEPS},
            logging={"exit_interval": stop, "log_interval": 1000},
        )
        ranks = call_on_ranks(_train, layout.world_size, config)
        if before is not None:
            problems += _differences(before, _whole([rank["begin"] for rank in ranks]), layout)
        before = _whole([rank["end"] for rank in ranks])
        for rank in ranks:
            if rank["reads_all"]:
                for step, digests in rank["rows"].items():
                    rows[step] = rows.get(step, Counter()) + digests
    if rows != expected:
        wrong = [step for step in expected if rows.get(step) != expected[step]]
        problems.append(f"steps {wrong} read other rows than one process does")
    return problems


def _train(rank: int, config: RunConfig) -> dict[str, Any]:
    """Train until the run ends or is to stop; returns its tensors before and after, and its rows by step."""
    rows: dict[int, Counter[str]] = {}
    with run_from(config) as run:
        begin = shards(run)
        loader = run.loader

        def watched() -> Any:
            for batch in loader:
                rows[batch.step] = Counter(row_digests(batch))
                yield batch

        run.loader = watched()
        train(run)
        groups = run.engine.groups
        reads_all = groups.tp_rank == 0 and groups.pp_rank == 0
        return {"begin": begin, "end": shards(run), "rows": rows, "reads_all": reads_all}


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a tensor."""

    name: str
    """Name of the tensor."""
    region: Region
    """Which part of it."""
    values: np.ndarray
    """(region.numel,) its values."""


def shards(run: Run) -> list[Shard]:
    """Return this rank's part of the weights and of Adam's moments."""
    model = native.model_state(run.engine)
    held = [*held_weights(model), *held_state(run.trainable.optimizer, model)]
    return [Shard(one.name, one.region, one.tensor.detach().flatten().clone().numpy()) for one in held]


def _whole(ranks: list[list[Shard]]) -> dict[str, np.ndarray]:
    """Return whole tensors, each element put where its rank says that it belongs."""
    whole: dict[str, np.ndarray] = {}
    for shard in (shard for rank in ranks for shard in rank):
        region = shard.region
        target = whole.setdefault(shard.name, np.full(region.shape, np.nan, dtype=shard.values.dtype))
        inside = np.unravel_index(np.arange(region.begin, region.end), region.size or (1,))
        place = tuple(axis + begin for axis, begin in zip(inside, region.offset, strict=False))
        target[place] = shard.values if region.shape else shard.values[0]
    return whole


def _differences(before: dict[str, np.ndarray], after: dict[str, np.ndarray], layout: Layout) -> list[str]:
    """Return which tensors are not bit-equal, if any."""
    if before.keys() != after.keys():
        return [f"{layout.name} has other tensors: {sorted(before.keys() ^ after.keys())[:3]}"]
    differing = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    if any(np.isnan(values).any() for values in after.values()):
        return [f"{layout.name}: some elements of tensors are on no rank"]
    return [f"loaded into {layout.name}, {len(differing)} tensors differ, first {differing[0]}"] if differing else []
