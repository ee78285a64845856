"""Naming slow ranks. Oracle: work written by hand; runs in which one rank sleeps where it is known to."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.config import RunConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.stragglers import RankWork, find_stragglers
from tests.distributed import run_distributed
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config, train_and_read

SLEEP_S = 0.25
STEPS = 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("stragglers") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


def slow_ranks(totals: list[float], num_stages: int = 1, ratio: float = 1.5, least_ms: float = 0.0) -> list[int]:
    work = [RankWork(total / 4, total * 3 / 4) for total in totals]
    return [straggler.rank for straggler in find_stragglers(work, num_stages, ratio, least_ms)]


def test_ranks_beyond_the_ratio_are_found_slowest_first() -> None:
    assert slow_ranks([100, 105, 100, 160, 200]) == [4, 3]
    assert slow_ranks([100, 101, 99, 100]) == []
    assert slow_ranks([100, 200]) == [1], "one of two ranks, whose mean it would share, can be slow"
    assert slow_ranks([500]) == []


def test_ranks_are_compared_with_their_own_stage() -> None:
    assert slow_ranks([100, 100, 100, 300, 300, 300], num_stages=2) == []
    assert slow_ranks([100, 100, 200, 300, 300, 300], num_stages=2) == [2]


def test_a_rank_that_costs_next_to_nothing_is_not_named() -> None:
    assert slow_ranks([1, 3], least_ms=2.0) == []
    assert slow_ranks([1, 3], least_ms=1.0) == [1]


class _Slow:
    """A loader that sleeps before each step."""

    def __init__(self, loader: Any, seconds: float) -> None:
        self.loader, self.seconds = loader, seconds

    def __iter__(self) -> Iterator[StepBatch]:
        for batch in self.loader:
            time.sleep(self.seconds)
            yield batch


class _Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _train(rank: int, world_size: int, config: RunConfig, sleeps: str) -> list[str]:
    """Train with rank 1 asleep in its loader, or rank 0 in the forward pass; return the warnings."""
    messages = _Messages()
    logging.getLogger("lcl_megatron.training.stragglers").addHandler(messages)
    with run_from(config) as run:
        if sleeps == "data" and rank == 1:
            run.loader = _Slow(run.loader, SLEEP_S)  # type: ignore[assignment]
        if sleeps == "forward" and rank == 0:
            run.engine.model.register_forward_pre_hook(lambda *_: time.sleep(SLEEP_S))
        train(run)
    return messages.texts


def _config(corpus: Path, log_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    logs = {"log_dir": str(log_dir), "log_interval": STEPS, "exit_interval": STEPS}
    return small_config(corpus, logging=logs, **sections)


def test_a_rank_that_waits_for_its_data_is_named_with_its_place(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, tmp_path, training={"micro_batch_size": 2})
    (warning,), nothing = run_distributed(_train, 2, config, "data")
    assert warning.startswith("slow: rank 1 (dp1 pp0 tp0) works ")
    assert float(warning.partition("(data ")[2].split()[0]) >= 1000 * SLEEP_S
    assert nothing == []
    (report,) = read_reports(tmp_path)
    assert report["perf/slowest_rank_ms"] >= 1000 * SLEEP_S
    assert report["perf/median_rank_ms"] < report["perf/slowest_rank_ms"] / 1.5
    # Rank 0 waited as long in the first collective: no work of its own.
    assert report["perf/step_ms"] >= 1000 * SLEEP_S


def test_a_rank_that_waits_for_a_slow_stage_does_not_work(corpus: Path, tmp_path: Path) -> None:
    """And the slow stage is not named either: with one rank on each, nobody else has its work."""
    config = _config(corpus, tmp_path, parallel={"pipeline_model_parallel_size": 2}, training={"micro_batch_size": 2})
    assert run_distributed(_train, 2, config, "forward") == [[], []]
    (report,) = read_reports(tmp_path)
    assert report["perf/slowest_rank_ms"] >= 1000 * SLEEP_S * 2, "two micro-batches"
    assert report["perf/median_rank_ms"] < 1000 * SLEEP_S


def test_peers_of_a_tensor_parallel_rank_are_named_as_such(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, tmp_path, parallel={"tensor_model_parallel_size": 2})
    (warning,), _ = run_distributed(_train, 2, config, "data")
    assert "rank 1 (dp0 pp0 tp1)" in warning
    assert warning.endswith(" ms with its tp peers)")


def test_an_even_run_names_nobody(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, tmp_path, training={"micro_batch_size": 2}, guard={"straggler_ratio": 50.0})
    assert run_distributed(_train, 2, config, "") == [[], []]
    assert read_reports(tmp_path)[0]["perf/slowest_rank_ms"] > 0


def test_nothing_is_compared_at_ratio_0(corpus: Path, tmp_path: Path) -> None:
    (report,) = train_and_read(_config(corpus, tmp_path, guard={"straggler_ratio": 0.0}))
    assert "perf/slowest_rank_ms" not in report
