"""Runs that go on with other numbers of ranks: the same tensors, the same rows in the same steps.

A run is trained for some steps in one layout, stops, and goes on in another, which then stops and goes on in a third.
Tensors are put together without the code that stores them: from each rank's shards as megatron-core describes them,
before and after. Rows are compared with those of one undisturbed process.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from benchmarks.chaos.findings import Findings
from benchmarks.chaos.launcher import row_digests
from benchmarks.chaos.processes import call_in_child, call_on_ranks
from benchmarks.chaos.small_run import DP2, DP2_PP2, DP2_TP2, ONE, PP2, TP2, TP2_PP2, Layout, make_corpus, small_config
from lcl_megatron.checkpoint import native
from lcl_megatron.config import RunConfig
from lcl_megatron.parallel.engine import Engine
from lcl_megatron.training.loop import train
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
        begin = shards(run.engine)
        loader = run.loader

        def watched() -> Any:
            for batch in loader:
                rows[batch.step] = Counter(row_digests(batch))
                yield batch

        run.loader = watched()
        train(run)
        groups = run.engine.groups
        reads_all = groups.tp_rank == 0 and groups.pp_rank == 0
        return {"begin": begin, "end": shards(run.engine), "rows": rows, "reads_all": reads_all}


Shards = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
"""Name, whole shape, place in it, values."""


def shards(engine: Engine) -> Shards:
    """Return this rank's part of the weights, as megatron-core describes it."""
    found = []
    for name, tensor in native.model_state(engine).items():
        if isinstance(tensor, ShardedTensor):
            shape = tuple(tensor.global_shape[tensor.prepend_axis_num :])
            place = tuple(tensor.global_offset[tensor.prepend_axis_num :])
            key = f"{tensor.key}/{tuple(tensor.global_offset[: tensor.prepend_axis_num])}"
            found.append((key, shape, place, tensor.data.detach().clone().numpy()))
        elif tensor is not None and not name.endswith("_extra_state"):
            raise TypeError(f"{name} is a {type(tensor).__name__}; only sharded tensors can be put together")
    return found


def _whole(ranks: list[Shards]) -> dict[str, np.ndarray]:
    """Return whole tensors."""
    whole: dict[str, np.ndarray] = {}
    for name, shape, place, values in (shard for rank in ranks for shard in rank):
        target = whole.setdefault(name, np.full(shape, np.nan, dtype=values.dtype))
        target[tuple(slice(begin, begin + size) for begin, size in zip(place, values.shape, strict=True))] = values
    return whole


def _differences(before: dict[str, np.ndarray], after: dict[str, np.ndarray], layout: Layout) -> list[str]:
    """Return which tensors are not bit-equal, if any."""
    if before.keys() != after.keys():
        return [f"{layout.name} has other tensors: {sorted(before.keys() ^ after.keys())[:3]}"]
    differing = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    return [f"loaded into {layout.name}, {len(differing)} tensors differ, first {differing[0]}"] if differing else []
