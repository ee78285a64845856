"""Damaged checkpoints: which one a run would go on from, and whether that is the newest whole one.

A root holds three checkpoints of a real run. The newest, or the newest two, or all are damaged in one place each; what
a run would load must be the newest of those that are left, and none where nothing is left. The choice is made
by the code that a run makes it with, on two ranks; every so often the whole start of a run is gone through, and what
its ranks hold then is compared with what they held when the checkpoint was loaded undamaged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos.batches import LARGEST_BATCH, SECONDS, by_kind
from benchmarks.chaos.damage import ADDED, KINDS, Damage, damage, damaged
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.launcher import Launch
from benchmarks.chaos.processes import ChildError, call_in_child, call_on_ranks, wait_until_alone
from benchmarks.chaos.small_run import DP2, make_corpus, small_config
from lcl_megatron.checkpoint.folders import step_folder
from lcl_megatron.checkpoint.manifest import CheckpointError, DamagedCheckpointError
from lcl_megatron.checkpoint.reader import newest_whole
from lcl_megatron.config import CheckpointConfig, ParallelConfig, RunConfig
from lcl_megatron.parallel import groups as process_groups
from lcl_megatron.training.resume import checkpoint_to_resume
from lcl_megatron.training.setup import run_from

LANE = "checkpoints"
STEPS = (5, 10, 15)
"""Checkpoints of the root."""
SHARES = ((1, 0.8), (2, 0.15), (3, 0.05))
"""How many of the newest are damaged in a case, and how often."""
PRISTINE = "pristine"
"""Copy of the root that nobody damages."""
NONE_LEFT = "refused"
"""What a run says when all are damaged."""


def run(seed: int, cases: Sequence[int], starts: Sequence[int], folder: Path) -> Findings:
    """Damage checkpoints in many ways.

    Args:
        seed: of the campaign.
        cases: numbers of the cases; each is a function of (seed, number).
        starts: those of them that also go through the whole start of a run.
        folder: scratch, in memory if possible.
    """
    findings = Findings(LANE, seed)
    config = saved_run(folder)
    shutil.copytree(config.checkpoint.save, folder / PRISTINE)
    findings.cases = _batches(cases, seed, folder, findings)
    whole = {step: call_on_ranks(_held, 2, _loading(config, step)) for step in STEPS}
    for number in starts:
        findings.cases.append(_start(number, seed, config, whole))
    damages = [case for case in findings.cases if case["kind"] != ADDED]
    findings.figures = {
        "corruptions": len(damages),
        "detected": sum(case["outcome"] == "right" for case in damages),
        "whole_starts": len(starts),
        "files_added": len(findings.cases) - len(damages),
        "kinds": by_kind(findings.cases),
    }
    for case in findings.cases:
        if case["outcome"] != "right":
            findings.fail(case["case"], f"{case['kind']}, {case['file']} ({case['detail']}): {case['message']}")
    return findings


def saved_run(folder: Path) -> RunConfig:
    """Train a small run on two ranks and return its configuration; its folder holds the checkpoints of ``STEPS``."""
    save = folder / "save"
    config = small_config(
        call_in_child(make_corpus, folder / "data"),
        DP2,
        training={"train_iters": STEPS[-1]},
        checkpoint={"save": str(save), "save_interval": STEPS[0]},
    )
    Launch(config, 2, folder / "launch", max_restarts=0).start()
    wait_until_alone(120.0)
    missing = [step for step in STEPS if not step_folder(save, step).is_dir()]
    if missing:
        raise RuntimeError(f"steps {missing} were not saved:\n{(folder / 'launch' / 'log.txt').read_text()}")
    return config


def draw(seed: int, number: int) -> tuple[random.Random, list[str]]:
    """Return a case's random numbers, and the kinds of damage done to the newest checkpoints, the newest first."""
    rng = random.Random(f"{seed}/{LANE}/{number}")
    kinds = list(KINDS)
    depth = rng.choices(*zip(*SHARES, strict=True))[0]
    kind, damages = kinds[number % len(kinds)], [kind for kind in kinds if kind != ADDED]
    # A file that is added is no damage: beside another one it would say nothing.
    return rng, [kind, *rng.choices(damages, k=depth - 1 if kind != ADDED else 0)]


def _batches(cases: Sequence[int], seed: int, folder: Path, findings: Findings) -> list[dict[str, Any]]:
    """Try cases on two ranks; a crash ends one batch only."""
    results: list[dict[str, Any]] = []
    for begin in range(0, len(cases), LARGEST_BATCH):
        batch = cases[begin : begin + LARGEST_BATCH]
        root = folder / f"batch-{batch[0]}"
        shutil.copytree(folder / PRISTINE, root)
        try:
            results += call_on_ranks(_batch, 2, batch, seed, root, timeout=SECONDS)[0]
        except ChildError as error:
            findings.fail(f"{batch[0]}-{batch[-1]}", f"a process ended: {error}")
        shutil.rmtree(root)
    return results


def _batch(rank: int, cases: Sequence[int], seed: int, root: Path) -> list[dict[str, Any]]:
    """Try some cases on all ranks; rank 0 does the damage. Returns what came of them."""
    logging.disable(logging.CRITICAL)
    groups = process_groups.initialize(ParallelConfig(), lambda pipeline: pipeline)
    results = []
    for number in cases:
        rng, kinds = draw(seed, number)
        with _all_damaged(root, rng, kinds) if rank == 0 else contextlib.nullcontext([]) as damages:
            groups.barrier()
            used, message = _used(lambda: checkpoint_to_resume(CheckpointConfig(load=str(root)), groups))
            if rank == 0:
                # What tools read of a folder of checkpoints.
                others, _ = _used(lambda: newest_whole(root))
                results.append(_judged(number, damages, used if used == others else f"{used} or {others}", message))
            groups.barrier()
    return results


def _used(choose: Callable[[], Path | None]) -> tuple[str, str]:
    """Return the name of the checkpoint that is chosen, or how that ends; and the message."""
    try:
        chosen = choose()
    except DamagedCheckpointError as error:
        return NONE_LEFT, str(error)
    except Exception as error:
        return "an unexplained error", f"{type(error).__name__}: {error}"
    return chosen.name if chosen else "a new run", ""


def _judged(number: int, damages: list[Damage], used: str, message: str) -> dict[str, Any]:
    expected = expected_use(damages)
    return {
        "case": number,
        **vars(damages[0]),
        "depth": len(damages),
        "outcome": "right" if used == expected else "wrong",
        "message": f"{used} instead of {expected}; {message}" if used != expected else message,
    }


def expected_use(damages: list[Damage]) -> str:
    """Return the name of the checkpoint that must be used after some damages, or that none may be."""
    if damages[0].kind == ADDED:
        return step_folder("", STEPS[-1]).name
    return step_folder("", STEPS[-1 - len(damages)]).name if len(damages) < len(STEPS) else NONE_LEFT


@contextlib.contextmanager
def _all_damaged(root: Path, rng: random.Random, kinds: list[str]) -> Iterator[list[Damage]]:
    """Damage the newest checkpoints of a root, one kind each; yields what was done."""
    with contextlib.ExitStack() as stack:
        damages = []
        for depth, kind in enumerate(kinds):
            damages.append(stack.enter_context(damaged(kind, *_places(root, depth), rng)))
        yield damages


def _places(root: Path, depth: int) -> tuple[Path, Path]:
    """Return the checkpoint to damage, and a whole one of another step."""
    other = step_folder(root.with_name(PRISTINE), STEPS[(1 - depth) % len(STEPS)])
    return step_folder(root, STEPS[-1 - depth]), other


def _start(number: int, seed: int, config: RunConfig, whole: dict[int, list[Any]]) -> dict[str, Any]:
    """Go through the whole start of a run on damaged checkpoints; it may put them aside, so nothing is undone."""
    rng, kinds = draw(seed, number)
    root = Path(config.checkpoint.save).with_name(f"start-{number}")
    shutil.copytree(root.with_name(PRISTINE), root)
    damages = [damage(kind, *_places(root, depth), rng) for depth, kind in enumerate(kinds)]
    held = call_on_ranks(_held_or_refused, 2, _saving(config, root))
    shutil.rmtree(root)
    used = next((step_folder("", step).name for step in STEPS if whole[step] == held), f"unknown: {held}")
    return _judged(number, damages, NONE_LEFT if held == [NONE_LEFT] * 2 else used, "")


def _saving(config: RunConfig, root: Path) -> RunConfig:
    """Return the run that goes on in a folder."""
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save=str(root)))


def _loading(config: RunConfig, step: int) -> RunConfig:
    """Return a run that begins with one checkpoint."""
    load = str(step_folder(config.checkpoint.save, step))
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, save="", load=load))


def _held_or_refused(rank: int, config: RunConfig) -> Any:
    try:
        return _held(rank, config)
    except CheckpointError:
        return NONE_LEFT


def _held(rank: int, config: RunConfig) -> Any:
    """Start a run; return its step, and a hash of all that it is trained with on this rank."""
    with run_from(config) as run:
        digest = hashlib.sha256()
        for parameter in run.engine.models[0].parameters():
            digest.update(parameter.detach().numpy().tobytes())
        for part in getattr(run.trainable.optimizer, "chained_optimizers", [run.trainable.optimizer]):
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    for name in ("exp_avg", "exp_avg_sq"):
                        digest.update(part.optimizer.state[parameter][name].numpy().tobytes())
        return run.progress.step, digest.hexdigest()
