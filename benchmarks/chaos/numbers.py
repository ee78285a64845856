"""Numbers that go wrong on one rank: pixels or gradients that are no numbers, gradients that are far too large.

One rank's step is poisoned; all ranks must leave weights and moments as they are in that step, count it alike, train on
in the next, and end with finite weights. A run whose steps all go wrong must end on all ranks, its checkpoint whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.chaos.batches import by_kind
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.processes import call_in_child, call_on_ranks
from benchmarks.chaos.small_run import DP2, PP2, TP2, Layout, make_corpus, small_config
from benchmarks.chaos.stored import damaged_checkpoints, newest_step
from lcl_megatron.config import RunConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.training.loop import train
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import NonFiniteError

LANE = "numbers"
STEPS = 16
WINDOW = 8
MOST_SKIPPED = 3
KINDS = ("pixels nan", "gradient nan", "gradient inf", "spike", "nan for good")
LAYOUTS = (DP2, TP2, PP2)


@dataclasses.dataclass(frozen=True)
class Poison:
    """What goes wrong."""

    kind: str
    """One of ``KINDS``."""
    rank: int
    """Where."""
    step: int
    """When, from 0."""

    def hits(self, step: int) -> bool:
        """Whether it goes wrong in a step."""
        return step == self.step or (self.kind == "nan for good" and step > self.step)


def run(seed: int, cases: list[int], folder: Path) -> Findings:
    """Poison steps.

    Args:
        seed: of the campaign.
        cases: numbers of the cases.
        folder: scratch.
    """
    findings = Findings(LANE, seed)
    corpus = call_in_child(make_corpus, folder / "data")
    for number in cases:
        poison, layout = draw(seed, number)
        save = folder / f"case-{number}"
        config = small_config(
            corpus,
            layout,
            training={"train_iters": STEPS},
            checkpoint={"save": str(save), "save_interval": 4},
            guard={"spike_threshold": 50.0, "spike_window": WINDOW, "max_skipped_steps": MOST_SKIPPED},
        )
        ranks = call_on_ranks(_train, layout.world_size, config, poison)
        problems = [*_problems(ranks, poison), *damaged_checkpoints(save)]
        if poison.kind == "nan for good" and newest_step(save) > poison.step:
            problems.append(f"step {newest_step(save)} was saved while steps were skipped")
        kind = f"{poison.kind}, rank {poison.rank} of {layout.name}"
        outcome = "not as promised" if problems else "as promised"
        findings.cases.append({"case": number, "kind": poison.kind, "layout": layout.name, "outcome": outcome})
        if problems:
            findings.fail(number, f"{kind}, step {poison.step + 1}: {'; '.join(problems)}")
    findings.figures = {
        "cases": len(cases),
        "as_promised": sum(case["outcome"] == "as promised" for case in findings.cases),
        "kinds": by_kind(findings.cases),
    }
    return findings


def draw(seed: int, number: int) -> tuple[Poison, Layout]:
    """Return what goes wrong in a case, and the layout."""
    rng = random.Random(f"{seed}/{LANE}/{number}")
    kind = KINDS[number % len(KINDS)]
    # Only ranks with pixels can have bad ones: under pipeline parallelism the first stage.
    layout = rng.choice(LAYOUTS) if kind != "pixels nan" else DP2
    return Poison(kind, rng.randrange(layout.world_size), rng.randint(WINDOW, STEPS - MOST_SKIPPED - 3)), layout


def _problems(ranks: list[dict[str, Any]], poison: Poison) -> list[str]:
    """Return what is not as it must be."""
    problems = []
    if any(rank["decided"] != ranks[0]["decided"] for rank in ranks):
        problems.append(f"ranks decided differently: {[rank['decided'] for rank in ranks]}")
    for number, rank in enumerate(ranks):
        skipped = [step for step, changed in rank["changed"].items() if not changed]
        expected = [step for step in rank["changed"] if poison.hits(step)]
        if skipped != expected:
            problems.append(f"rank {number}: weights were left alone in steps {skipped} instead of {expected}")
        if not rank["finite"]:
            problems.append(f"rank {number}: weights are not finite")
        if rank["ended"] != (poison.kind == "nan for good"):
            problems.append(f"rank {number}: the run {'ended' if rank['ended'] else 'went on'}")
    return problems


def _train(rank: int, config: RunConfig, poison: Poison) -> dict[str, Any]:
    """Train, with a poisoned step; returns in which steps weights or moments changed, and what was decided."""
    changed: dict[int, bool] = {}
    with run_from(config) as run:
        now = _Now()
        # A spike comes from the data, so tensor-parallel ranks, which share them, have it alike.
        is_hit = rank == poison.rank or (poison.kind == "spike" and run.engine.groups.tp_size > 1)
        now.poison = poison if is_hit else None
        if is_hit and poison.kind != "pixels nan":
            parameter = next(p for p in run.engine.models[0].parameters() if p.requires_grad and p.dim() > 1)
            parameter.register_hook(lambda gradient: gradient * now.factor())
        run.loader = _poisoned(run.loader, run, changed, now)
        ended = False
        try:
            train(run)
        except NonFiniteError:
            ended = True
            changed[now.step] = now.digest != state_digest(run)
        finite = all(bool(torch.isfinite(p).all()) for model in run.engine.models for p in model.parameters())
        return {"changed": changed, "decided": run.guard.state_dict(), "finite": finite, "ended": ended}


@dataclasses.dataclass
class _Now:
    """The step that is being trained."""

    step: int = -1
    digest: str = ""
    """Of the state before the step."""
    poison: Poison | None = None
    """What goes wrong on this rank."""

    def factor(self) -> float:
        """Return what gradients are multiplied by."""
        if self.poison is None or not self.poison.hits(self.step):
            return 1.0
        return {"spike": 1e6, "gradient inf": math.inf}.get(self.poison.kind, math.nan)


def _poisoned(loader: Iterable[StepBatch], run: Run, changed: dict[int, bool], now: _Now) -> Iterator[StepBatch]:
    """Yield the run's steps; note for each whether it changed anything."""
    for batch in loader:
        if now.poison is not None and now.poison.kind == "pixels nan" and now.poison.hits(batch.step):
            batch = dataclasses.replace(batch, micro_batches=tuple(map(_without_numbers, batch.micro_batches)))
        now.step, now.digest = batch.step, state_digest(run)
        yield batch
        changed[batch.step] = now.digest != state_digest(run)


def _without_numbers(micro_batch: Any) -> Any:
    return dataclasses.replace(micro_batch, images=torch.full(micro_batch.images.shape, math.nan))


def state_digest(run: Run) -> str:
    """Return a hash of this rank's weights and moments."""
    digest = hashlib.sha256()
    for model in run.engine.models:
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
    for part in getattr(run.trainable.optimizer, "chained_optimizers", [run.trainable.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter, {})
                for name in ("exp_avg", "exp_avg_sq"):
                    if name in state:
                        digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()
