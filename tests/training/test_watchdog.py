"""A hang is noticed, its cause is named, and it ends.

Oracle: ranks that are made to sleep, stop or die at a known step; the files and messages that are left; exit statuses.
Nothing is awaited for a fixed time: a rank stays where it is until the expected file is there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.config import ParallelConfig, RunConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel.groups import initialize
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.watchdog import HANGS_FOLDER, HangLimits, Watchdog
from tests.distributed import RankError, run_distributed
from tests.training.small_runs import DataFolder, plain_document, small_config

PATIENCE_S = 60.0
STEP = 3
"""The step at which something happens, 1 for the first."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("watchdog") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


def hasty(corpus: Path, log_dir: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run that speaks after 1.2 s."""
    sections = {"training": {"micro_batch_size": 1}, "guard": {"hang_minutes": 0.02}, **sections}
    return small_config(corpus, logging={"log_dir": str(log_dir), "exit_interval": STEP + 1}, **sections)


class _Interrupted:
    """A loader that calls a function before one step."""

    def __init__(self, loader: Any, function: Callable[[], None]) -> None:
        self.loader, self.function = loader, function

    def __iter__(self) -> Iterator[StepBatch]:
        for batch in self.loader:
            if batch.step == STEP - 1:
                self.function()
            yield batch


def _train(rank: int, world_size: int, config: RunConfig, culprit: int, function: Callable[[], None]) -> None:
    with run_from(config) as run:
        if rank == culprit:
            run.loader = _Interrupted(run.loader, function)  # type: ignore[assignment]
        train(run)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def report_of(log_dir: Path, rank: int) -> Path:
    return log_dir / HANGS_FOLDER / f"rank-{rank:05d}.txt"


def has(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


def test_a_rank_that_sleeps_is_named_by_all_and_shows_where(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def sleep_until_all_have_spoken() -> None:
        wait_until(lambda: all(has(report_of(tmp_path, rank), "most recent") for rank in range(2)), "both reports")

    run_distributed(_train, 2, hasty(corpus, tmp_path), 1, sleep_until_all_have_spoken)
    named = f"rank 1 (dp1 pp0 tp0) is behind: step {STEP}, data, for "
    waiting, sleeping = (report_of(tmp_path, rank).read_text() for rank in range(2))
    assert f"rank 0 (dp0 pp0 tp0) hangs: step {STEP}, agree, for " in waiting
    assert f"rank 1 (dp1 pp0 tp0) hangs: step {STEP}, data, for " in sleeping
    for report in (waiting, sleeping):
        assert named in report
        assert report.count(f" hangs: step {STEP}, ") == 1, "once per hang"
        assert "goes on again, after " in report
    assert "in sleep_until_all_have_spoken" in sleeping
    assert "in agree" in waiting
    assert "in sleep_until_all_have_spoken" not in waiting
    log = capfd.readouterr().err
    assert log.count(named) == 2
    assert f"stacks: {report_of(tmp_path, 0)}" in log
    assert "in sleep_until_all_have_spoken" in log, "the suspect's stacks are in the log of all"
    assert "in agree" not in log


def test_a_stopped_rank_is_named_and_its_lost_time_is_no_hang_of_its_own(corpus: Path, tmp_path: Path) -> None:
    process, spoken = tmp_path / "pid", report_of(tmp_path, 0)

    def stop() -> None:
        process.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    def wake() -> None:
        wait_until(lambda: has(spoken, "most recent"), "the report of rank 0")
        os.kill(int(process.read_text()), signal.SIGCONT)

    waker = threading.Thread(target=wake)
    waker.start()
    run_distributed(_train, 2, hasty(corpus, tmp_path), 1, stop)
    waker.join()
    assert "rank 1 (dp1 pp0 tp0) is behind: last heard of in step " in spoken.read_text()
    assert ", silent for at least " in spoken.read_text()
    assert "goes on again" in spoken.read_text()
    assert not report_of(tmp_path, 1).exists()


def test_when_a_rank_is_killed_the_others_say_who_they_are_and_who_is_gone(corpus: Path, tmp_path: Path) -> None:
    """Also when the launcher, which sees the dead rank at once, sends the others SIGTERM meanwhile."""

    def train_and_die(rank: int, world_size: int) -> None:
        (tmp_path / f"pid-{rank}").write_text(str(os.getpid()))
        _train(rank, world_size, hasty(corpus, tmp_path), 2, die)

    def die() -> None:
        others = " ".join((tmp_path / f"pid-{rank}").read_text() for rank in (0, 1, 3))
        subprocess.Popen(["sh", "-c", f"sleep 0.2; kill -TERM {others}"])
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankError) as caught:
        run_distributed(train_and_die, 4)
    report = str(caught.value)
    assert "rank 2 died without a report: signal SIGKILL" in report
    errors = [part for part in report.split("CollectiveError: ")[1:]]
    assert len(errors) == 3
    for error in errors:
        assert error.startswith(tuple(f"rank {rank} (dp{rank} pp0 tp0): step {STEP}, " for rank in (0, 1, 3)))
        assert "a collective failed: " in error
        suspects = [line.strip() for line in error.splitlines() if line.startswith("  rank ")]
        assert len(suspects) == 1
        assert suspects[0].startswith("rank 2 (dp2 pp0 tp0) is ")
        assert "silent for at least" in suspects[0]


def test_when_a_rank_fails_the_others_point_to_it(corpus: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of rank 1")

    with pytest.raises(RankError, match=rf"rank 1 \(dp1 pp0 tp0\) left the run in step {STEP}: see its own messages"):
        run_distributed(_train, 2, hasty(corpus, tmp_path, training={"micro_batch_size": 2}), 1, fail)


def test_without_a_watch_the_error_still_says_where(corpus: Path, tmp_path: Path) -> None:
    config = hasty(corpus, tmp_path, guard={"hang_minutes": 0.0})
    with pytest.raises(RankError, match=rf"(?s)rank 0 \(dp0 pp0 tp0\): step {STEP}, .*: guard\.hang_minutes = 0 "):
        run_distributed(_train, 2, config, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _hold_the_lock() -> None:
    """Sleep in C without releasing the interpreter's lock, which no Python thread survives."""
    ctypes.PyDLL(None).sleep(int(PATIENCE_S))


@pytest.mark.parametrize(
    ("function", "said", "frame"),
    [
        (lambda: time.sleep(PATIENCE_S), "rank 0 (dp0 pp0 tp0) ends: it stood in step 3, data, for ", "in <lambda>"),
        (_hold_the_lock, "Timeout (", "in _hold_the_lock"),
    ],
    ids=["outside collectives", "with the interpreter's lock"],
)
def test_a_hang_that_nothing_ends_ends_the_process(
    function: Callable[[], None],
    said: str,
    frame: str,
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = hasty(corpus, tmp_path, parallel={"distributed_timeout_minutes": 0.03})
    with pytest.raises(RankError, match="rank 0 died without a report: exit status 1"):
        run_distributed(_train, 1, config, 0, function)
    log = capfd.readouterr().err
    assert said in log
    assert frame in log


def test_other_errors_are_left_alone(corpus: Path) -> None:
    with pytest.raises(RuntimeError, match="^shapes differ$") as caught, run_from(small_config(corpus)):
        raise RuntimeError("shapes differ")
    assert type(caught.value) is RuntimeError


def test_a_clock_that_jumps_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a suspended machine: of an hour between two looks, no more counts than the thread slept."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    jumped, looks = threading.Event(), []

    def clock() -> float:
        looks.append(time.monotonic())
        return time.monotonic() + 3600 * jumped.is_set()

    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    watchdog = Watchdog(groups, HangLimits(1.2, 1e6, 1e6), tmp_path, clock)
    try:
        watchdog.start()
        watchdog.mark("data", 1)
        before = len(looks)
        wait_until(lambda: len(looks) > before, "a look")
        jumped.set()
        path = tmp_path / "rank-00000.txt"
        wait_until(lambda: has(path, "most recent"), "a report")
        assert "hangs: step 1, data, for 3" not in path.read_text()
        assert "hangs: step 1, data, for " in path.read_text()
    finally:
        watchdog.close()
        groups.destroy()


def test_a_long_step_that_gets_on_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many micro-batches within one phase: as long as forward passes begin, nothing is said."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    looks: list[int] = []

    def passes() -> int:
        # One more at every look, for five times as many looks as would make a report.
        looks.append(len(looks))
        return min(len(looks), 20)

    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    watchdog = Watchdog(groups, HangLimits(0.4, 1e6, 1e6), tmp_path)
    watchdog.follow(passes)
    path = tmp_path / "rank-00000.txt"
    try:
        watchdog.start()
        watchdog.mark("forward_backward", 1)
        wait_until(lambda: len(looks) >= 20, "looks")
        assert not path.exists()
        wait_until(lambda: has(path, "hangs: step 1, forward_backward"), "a report when the passes have ended")
    finally:
        watchdog.close()
        groups.destroy()


def test_a_file_that_cannot_be_written_does_not_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").write_text("no folder")
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    watchdog = Watchdog(groups, HangLimits(0.2, 1000.0, 1000.0), tmp_path / "file")
    said: list[str] = []

    def has_said(text: str) -> bool:
        said.append(capsys.readouterr().err)
        return text in "".join(said)

    try:
        watchdog.start()
        wait_until(lambda: has_said("cannot be written"), "the message")
        assert "in wait_until" in "".join(said)
    finally:
        watchdog.close()
        groups.destroy()


def test_limits_follow_the_configuration(corpus: Path) -> None:
    config = small_config(
        corpus,
        guard={"hang_minutes": 3.0},
        parallel={"distributed_timeout_minutes": 10.0},
        checkpoint={"save_timeout_minutes": 20.0},
    )
    limits = HangLimits.of(config)
    assert limits == HangLimits(report_s=180.0, exit_s=660.0, exit_disk_s=1860.0)
    assert limits.exit_in("agree") == 660.0
    assert limits.exit_in("save") == limits.exit_in("load") == 1860.0
