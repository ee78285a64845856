"""Stopping and going on, through the real setup and loop, on a corpus of the real writer.

Oracle: the run that was never stopped. In the same layout the resumed run must end with the same bits; in another
layout it must read the same rows in the same order, and its losses agree to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcl_megatron.checkpoint.folders import Progress, step_folder
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import CheckpointConfig, LoggingConfig, RunConfig
from lcl_megatron.training.loop import train
from lcl_megatron.training.metrics_reader import read_metrics
from lcl_megatron.training.setup import run_from
from tests.checkpoint import runs
from tests.checkpoint.runs import CONFIG, HeldState, Layout
from tests.distributed import run_distributed

HALF, WHOLE = 2, 4
LOSS_TOLERANCE = 1e-4
"""Relative, after two steps in another layout; seen: at most 2e-6."""

ONE = Layout("one process")
DP2 = Layout("dp2", dp=2)
PP2 = Layout("pp2", cuts=("vision.1",))
PP2X2 = Layout("pp2 x 2 stages", cuts=("vision.1", "language.embed", "language.1"), stages_per_rank=2)
TP2 = Layout("tp2, sequence parallel", tp=2, sequence_parallel=True)
CP2 = Layout("cp2", cp=2)
DP2_PLAIN = Layout("dp2, whole optimizer", dp=2, distributed_optimizer=False)

Rows = dict[int, tuple[list[tuple[int, ...]], list[int]]]
"""Step -> tokens of this rank's rows, and keys of their images."""


@dataclass(frozen=True)
class Outcome:
    """What one rank tells of a run."""

    state: HeldState
    rows: Rows
    progress: Progress


def _config(layout: Layout, corpus: Path, precision: str = "fp32") -> RunConfig:
    # Micro-batches of all data-parallel ranks together always hold two rows: the same negatives in every layout.
    return dataclasses.replace(
        layout.apply(CONFIG),
        language=dataclasses.replace(CONFIG.language, vocab_size=0),
        data=dataclasses.replace(CONFIG.data, data_path=(str(corpus),)),
        training=dataclasses.replace(
            CONFIG.training, train_iters=WHOLE, micro_batch_size=2 // layout.dp, precision=precision
        ),
    )


def _run(rank: int, world_size: int, config: RunConfig) -> Outcome:
    with run_from(config) as run:
        rows = {
            batch.step: (
                [tuple(tokens.tolist()) for micro_batch in batch.micro_batches for tokens in micro_batch.tokens],
                [key for micro_batch in batch.micro_batches for key in micro_batch.image_keys.tolist()],
            )
            for batch in run.loader
        }
        train(run)
        return Outcome(runs.held_state(run.trainable), rows, run.progress)


@pytest.fixture(scope="module")
def uninterrupted(
    corpus_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, list[Outcome]]]:
    """Train to the end in a layout, with a checkpoint half-way; once per layout."""
    known: dict[tuple[Layout, str], tuple[Path, list[Outcome]]] = {}

    def get(layout: Layout, precision: str = "fp32") -> tuple[Path, list[Outcome]]:
        if (layout, precision) not in known:
            folder = tmp_path_factory.mktemp("uninterrupted")
            config = dataclasses.replace(
                _config(layout, corpus_path, precision),
                checkpoint=CheckpointConfig(save=str(folder), save_interval=HALF),
                logging=LoggingConfig(log_interval=1, log_dir=str(folder / "log") if layout == ONE else ""),
            )
            known[layout, precision] = folder, run_distributed(_run, layout.world_size, config)
        return known[layout, precision]

    return get


def _losses(log_dir: Path) -> dict[int, tuple[float, float]]:
    metrics = read_metrics(log_dir)
    generation, contrastive = (metrics.points(f"loss/{name}", "step") for name in ("generation", "contrastive"))
    return {int(step): (x, y) for step, x, y in zip(generation[0], generation[1], contrastive[1], strict=True)}


def _all_rows(outcomes: list[Outcome]) -> dict[int, list[set[Any]]]:
    """Return what all ranks read in each step: rows, and keys of images."""
    steps = outcomes[0].rows.keys()
    return {step: [{x for o in outcomes for x in o.rows[step][kind]} for kind in (0, 1)] for step in steps}


def _assert_same_end(resumed: list[Outcome], expected: list[Outcome]) -> None:
    for after, straight in zip(resumed, expected, strict=True):
        assert after.state.adam_steps == straight.state.adam_steps == [WHOLE]
        assert after.state.learning_rate == straight.state.learning_rate
        assert after.progress == straight.progress
        assert after.rows == {step: straight.rows[step] for step in range(HALF, WHOLE)}
    runs.assert_same_bits(*(runs.whole_state([o.state for o in outcomes]) for outcomes in (resumed, expected)))


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        (ONE, "fp32"),
        (ONE, "bf16"),
        (DP2, "fp32"),
        (DP2_PLAIN, "fp32"),
        (PP2, "fp32"),
        (PP2X2, "bf16"),
        (TP2, "fp32"),
        (CP2, "fp32"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(
    layout: Layout, precision: str, uninterrupted: Callable[..., Any], corpus_path: Path
) -> None:
    folder, expected = uninterrupted(layout, precision)
    config = dataclasses.replace(
        _config(layout, corpus_path, precision), checkpoint=CheckpointConfig(load=str(step_folder(folder, HALF)))
    )
    _assert_same_end(run_distributed(_run, layout.world_size, config), expected)


def test_run_that_stopped_itself_goes_on_from_where_it_saved(
    uninterrupted: Callable[..., Any], corpus_path: Path, tmp_path: Path
) -> None:
    """Nothing but the folder is given the second time, and no interval falls on the stop."""
    config = dataclasses.replace(_config(ONE, corpus_path), checkpoint=CheckpointConfig(save=str(tmp_path)))
    stopping = dataclasses.replace(config, logging=LoggingConfig(exit_interval=HALF))
    (first,) = run_distributed(_run, 1, stopping)
    assert first.progress.step == HALF
    assert first.progress.consumed_rows == HALF * config.training.global_batch_size
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{HALF:08d}"]
    resumed = run_distributed(_run, 1, config)
    _assert_same_end(resumed, uninterrupted(ONE)[1])
    # The finished run has nothing left to do.
    (third,) = run_distributed(_run, 1, config)
    assert third.rows == {}
    assert third.progress == resumed[0].progress


@pytest.mark.parametrize("layout", [DP2, PP2, PP2X2, TP2, CP2], ids=lambda layout: layout.name)
def test_run_resumed_in_another_layout_reads_on_and_learns_alike(
    layout: Layout, uninterrupted: Callable[..., Any], corpus_path: Path, tmp_path: Path
) -> None:
    folder, expected = uninterrupted(ONE)
    config = dataclasses.replace(
        _config(layout, corpus_path),
        checkpoint=CheckpointConfig(load=str(step_folder(folder, HALF))),
        logging=LoggingConfig(log_interval=1, log_dir=str(tmp_path)),
    )
    resumed = run_distributed(_run, layout.world_size, config)
    rows, expected_rows = _all_rows(resumed), _all_rows(expected)
    assert rows == {step: expected_rows[step] for step in range(HALF, WHOLE)}
    losses, expected_losses = _losses(tmp_path), _losses(folder / "log")
    assert losses.keys() == {HALF + 1, HALF + 2}
    for step, values in losses.items():
        assert values == pytest.approx(expected_losses[step], rel=LOSS_TOLERANCE)
    after, straight = (runs.whole_state([o.state for o in outcomes]) for outcomes in (resumed, expected))
    for name in (name for name in straight if name.startswith("weight/")):
        # Adam moves an entry by the learning rate, also where the gradient is only rounding.
        np.testing.assert_allclose(after[name], straight[name], atol=2 * HALF * config.optimizer.lr, err_msg=name)


def test_the_compared_runs_learn_and_read_different_rows(uninterrupted: Callable[..., Any]) -> None:
    folder, (outcome,) = uninterrupted(ONE)
    losses = _losses(folder / "log")
    assert len({values[0] for values in losses.values()}) == WHOLE
    assert all(values[1] > 0.1 for values in losses.values())
    rows = {row for rows, _ in outcome.rows.values() for row in rows}
    assert len(rows) == WHOLE * CONFIG.training.global_batch_size


def _refused(rank: int, world_size: int, config: RunConfig) -> str:
    with pytest.raises(CheckpointError) as refusal, run_from(config):
        pass
    return str(refusal.value)


def test_another_order_of_data_is_refused(uninterrupted: Callable[..., Any], corpus_path: Path) -> None:
    folder, _ = uninterrupted(ONE)
    config = _config(ONE, corpus_path)
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, seed=77),
        checkpoint=CheckpointConfig(load=str(folder)),
    )
    (message,) = run_distributed(_refused, 1, config)
    assert "was trained on other data:\n  training.seed: 1234 in the checkpoint, 77 here" in message


def test_folder_without_a_checkpoint_is_refused_when_asked_to_load(corpus_path: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(_config(ONE, corpus_path), checkpoint=CheckpointConfig(load=str(tmp_path)))
    (message,) = run_distributed(_refused, 1, config)
    assert "no complete checkpoint (step-NNNNNNNN) there" in message
