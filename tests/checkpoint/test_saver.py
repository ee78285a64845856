"""Writing while training goes on, on two ranks. Oracles: the folder; writer processes killed and stopped on purpose;
``manifest.verify``.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.checkpoint import manifest
from lcl_megatron.checkpoint.lease import LEASE_FILE, Lease, LeaseError
from lcl_megatron.checkpoint.manifest import verify
from lcl_megatron.checkpoint.saver import SaveError, Saver, remove_remains
from lcl_megatron.checkpoint.shard_file import NewPiece, Region, file_header
from lcl_megatron.checkpoint.writer_process import NewFile
from lcl_megatron.config import CheckpointConfig, ParallelConfig
from lcl_megatron.parallel.groups import ProcessGroups, initialize
from tests.checkpoint.test_writer_process import image
from tests.distributed import run_distributed

Body = Callable[[Saver, ProcessGroups, Path], Any]
Run = Callable[..., list[Any]]


def _files(rank: int, step: int) -> list[NewFile]:
    header = file_header([NewPiece("a", Region((2, 8), (rank, 0), (1, 8), 0, 8), "U8", 1)])
    return [image(f"a-{rank}.safetensors", header + bytes([step] * 8)), image(f"text-{rank}", b"t" * rank)]


def _rank(rank: int, world_size: int, body: Body, root: Path, here: Path, changes: dict[str, Any]) -> Any:
    # What is deleted by mistake is at least not the sources.
    os.chdir(here)
    groups = initialize(ParallelConfig(), lambda ranks: ranks[:1])
    lease = Lease(root, "one") if rank == 0 else None
    groups.barrier()
    saver = Saver(CheckpointConfig(save=str(root), **changes), groups, "one", lease)
    try:
        outcome = body(saver, groups, root)
        assert (here / "bystander").exists()
        return outcome
    finally:
        saver.close()
        if lease is not None:
            lease.close()


@pytest.fixture
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    here = tmp_path_factory.mktemp("here")
    (here / "bystander").touch()

    def run(body: Body, root: Path, **changes: Any) -> list[Any]:
        return run_distributed(_rank, 2, body, root, here, changes)

    return run


def _begin(saver: Saver, groups: ProcessGroups, step: int) -> None:
    saver.begin(step, lambda: _files(groups.rank, step))


def _step(saver: Saver, groups: ProcessGroups) -> None:
    """What the loop does at every step."""
    saver.advance(*groups.any_rank(*saver.poll(0.01)))


def _steps(root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in root.glob("step-*"))


def test_a_checkpoint_is_completed_while_steps_go_on(tmp_path: Path, on_two_ranks: Run) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> int:
        _begin(saver, groups, 5)
        steps = 0
        while saver.is_saving:
            _step(saver, groups)
            steps += 1
        assert saver.durable_step == 5
        return steps

    steps = on_two_ranks(body, tmp_path)
    # Files, and then the manifest: at least two agreements, the same number on both ranks.
    assert steps[0] == steps[1] >= 2
    manifest = verify(tmp_path / "step-00000005")
    assert set(manifest.files) == {"a-0.safetensors", "a-1.safetensors", "text-0", "text-1", "index.json"}
    assert (manifest.step, manifest.attempt) == (5, "one")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_beginning_the_next_one_waits_for_the_one_before(tmp_path: Path, on_two_ranks: Run) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> list[int | None]:
        durable = []
        for step in (1, 2, 2, 3):
            _begin(saver, groups, step)
            durable.append(saver.durable_step)
        saver.finish()
        return [*durable, saver.durable_step]

    # Step 2 is there when it is asked for again: nothing is written in place.
    assert on_two_ranks(body, tmp_path) == [[None, 1, 2, 2, 3]] * 2
    for step in (1, 2, 3):
        verify(tmp_path / f"step-{step:08d}")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_killed_writer_costs_one_checkpoint_on_all_ranks(
    victim: int, policy: str, tmp_path: Path, on_two_ranks: Run
) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> str:
        _begin(saver, groups, 1)
        saver.finish()
        if groups.rank == victim:
            os.kill(saver.writer.pid or 0, signal.SIGSTOP)
        _begin(saver, groups, 2)
        for _ in range(3):
            _step(saver, groups)
        assert saver.is_saving
        if groups.rank == victim:
            os.kill(saver.writer.pid or 0, signal.SIGKILL)
        if policy == "stop":
            with pytest.raises(SaveError) as failure:
                saver.finish()
            return str(failure.value)
        saver.finish()
        assert saver.failures == 1
        with pytest.raises(SaveError, match=r"last checkpoint could not .* that this run completed: step 1"):
            saver.require_success()
        _begin(saver, groups, 3)
        saver.finish()
        saver.require_success()
        return ""

    messages = on_two_ranks(body, tmp_path, on_save_error=policy)
    if policy == "stop":
        for message in messages:
            assert f"the checkpoint of step 2 could not be written to {tmp_path}: rank {victim} (dp{victim}" in message
            assert "died (exit status -9). The one before is whole" in message
    steps = [1] if policy == "stop" else [1, 3]
    assert _steps(tmp_path) == steps
    for step in steps:
        verify(tmp_path / f"step-{step:08d}")
    assert not list(tmp_path.glob(".staging*"))


def test_a_writer_that_hangs_is_given_up(tmp_path: Path, on_two_ranks: Run) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> None:
        _begin(saver, groups, 1)
        saver.finish()
        if groups.rank == 1:
            os.kill(saver.writer.pid or 0, signal.SIGSTOP)
        _begin(saver, groups, 2)
        with pytest.raises(SaveError, match=r"rank 1 .*not written within checkpoint.save_timeout_minutes = 0.01"):
            saver.finish()

    on_two_ranks(body, tmp_path, on_save_error="stop", save_timeout_minutes=0.01)
    assert len(_steps(tmp_path)) <= 1


def test_a_folder_that_vanishes_during_a_save_is_an_error_and_then_made_again(
    tmp_path: Path, on_two_ranks: Run
) -> None:
    root = tmp_path / "root"

    def body(saver: Saver, groups: ProcessGroups, root: Path) -> list[int]:
        _begin(saver, groups, 1)
        saver.finish()
        os.kill(saver.writer.pid or 0, signal.SIGSTOP)
        _begin(saver, groups, 2)
        if groups.rank == 0:
            root.rename(root.with_name("away"))
        groups.barrier()
        os.kill(saver.writer.pid or 0, signal.SIGCONT)
        saver.finish()
        failures = saver.failures
        _begin(saver, groups, 3)
        saver.finish()
        return [failures, saver.failures]

    assert on_two_ranks(body, root) == [[1, 0]] * 2
    assert _steps(root) == [3]
    assert _steps(tmp_path / "away") == [1]
    verify(root / "step-00000003")


def test_a_file_in_the_way_is_an_error_on_all_ranks_and_costs_nothing_else(tmp_path: Path, on_two_ranks: Run) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> None:
        if groups.rank == 0:
            (root / LEASE_FILE).unlink()
            root.rmdir()
            root.write_text("")
        groups.barrier()
        with pytest.raises(
            SaveError, match=r"step 1 could not be written to .*root: rank 0 .*(File exists|Not a dir)"
        ) as e:
            _begin(saver, groups, 1)
        assert "rank 1" not in str(e.value)

    on_two_ranks(body, tmp_path / "root", on_save_error="stop")


def test_a_checkpoint_of_another_version_is_not_written_over_on_any_rank(
    tmp_path: Path, on_two_ranks: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 alone looks, and the others hear of it."""

    def body(saver: Saver, groups: ProcessGroups, root: Path) -> None:
        with pytest.raises(SaveError, match=r"format .*99.* take the version that wrote it; it is in the way"):
            _begin(saver, groups, 1)

    folder = tmp_path / "step-00000001"
    folder.mkdir()
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 99)
    content = manifest.Manifest(1, "later", {}).text()
    monkeypatch.undo()
    (folder / manifest.MANIFEST_FILE).write_text(content)
    on_two_ranks(body, tmp_path, on_save_error="stop")
    assert (folder / manifest.MANIFEST_FILE).read_text() == content


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_has_the_name_of_a_checkpoint_and_is_none_does_not_pass_for_it(
    is_folder: bool, tmp_path: Path, on_two_ranks: Run
) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> None:
        with pytest.raises(SaveError, match=r"root/step-00000001.*; it is in the way: move it away"):
            _begin(saver, groups, 1)

    root = tmp_path / "root"
    root.mkdir()
    if is_folder:
        (root / "step-00000001").mkdir()
    else:
        (root / "step-00000001").touch()
    on_two_ranks(body, root, on_save_error="stop")
    assert _steps(root) == [1]


def test_only_remains_of_checkpoints_are_removed(tmp_path: Path) -> None:
    for name in (".staging-step-00000001-one", ".pruned-step-00000001", ".staging-export", "step-00000002"):
        (tmp_path / name / "deep").mkdir(parents=True)
    remove_remains(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging-export", "step-00000002"]


def test_of_many_ranks_that_fail_alike_a_few_are_named(tmp_path: Path) -> None:
    def rank(rank: int, world_size: int) -> str:
        groups = initialize(ParallelConfig(), lambda ranks: ranks[:1])
        saver = Saver(CheckpointConfig(save=str(tmp_path), on_save_error="stop"), groups, "one", None)
        # What no rank can write.
        saver.begin(1, lambda: [image("absent/file", b"")])
        with pytest.raises(SaveError) as failure:
            saver.finish()
        saver.close()
        return str(failure.value)

    for message in run_distributed(rank, 10):
        assert all(f"rank {number} " in message for number in range(8))
        assert "; and 2 more ranks. The one before" in message


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({"keep_last": 2}, [5, 6]), ({"keep_last": 2, "keep_every": 3}, [3, 5, 6]), ({}, [1, 2, 3, 4, 5, 6])],
)
def test_old_checkpoints_are_deleted_as_asked(
    changes: dict[str, Any], kept: list[int], tmp_path: Path, on_two_ranks: Run
) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> None:
        for step in range(1, 7):
            _begin(saver, groups, step)
        saver.finish()

    (tmp_path / "notes.txt").write_text("mine")
    on_two_ranks(body, tmp_path, **changes)
    assert _steps(tmp_path) == kept
    assert (tmp_path / "notes.txt").exists()
    assert not list(tmp_path.glob(".pruned*"))


def test_what_is_no_folder_or_of_a_later_step_neither_counts_nor_goes(tmp_path: Path, on_two_ranks: Run) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> None:
        for step in range(1, 5):
            _begin(saver, groups, step)
        saver.finish()

    root, archive = tmp_path / "root", tmp_path / "archive"
    archive.mkdir()
    (archive / "file").touch()
    # Damaged ones that could not be put aside, say: beside them the run's own would be the oldest.
    for step in (90, 91):
        (root / f"step-{step:08d}").mkdir(parents=True)
    (root / "step-00000000").symlink_to(archive)
    on_two_ranks(body, root, keep_last=2)
    assert _steps(root) == [0, 3, 4, 90, 91]
    assert (archive / "file").exists()


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    groups = initialize(ParallelConfig(), lambda ranks: ranks[:1])
    saver = Saver(CheckpointConfig(save=str(tmp_path), keep_last=2, on_save_error="stop"), groups, "one", None)
    # Half of it was left by a file system that could not delete everything.
    (tmp_path / ".pruned-step-00000001" / "rest").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3, 4):
            saver.begin(step, lambda: _files(0, 1)[1:])
        saver.finish()
    assert saver.durable_step == 4
    assert "an old checkpoint could not be deleted: [Errno 39] Directory not empty: " in caplog.text
    assert _steps(tmp_path) == [1, 3, 4]
    saver.close()
    groups.destroy()


def test_a_run_that_has_lost_its_lease_publishes_nothing(tmp_path: Path, on_two_ranks: Run) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> str:
        _begin(saver, groups, 1)
        saver.finish()
        os.kill(saver.writer.pid or 0, signal.SIGSTOP)
        _begin(saver, groups, 2)
        if groups.rank == 0:
            # Another run, on another machine, has waited long enough.
            other = root / f"{LEASE_FILE}-other"
            other.write_text((root / LEASE_FILE).read_text().replace('"attempt": "one"', '"attempt": "two"'))
            other.rename(root / LEASE_FILE)
        groups.barrier()
        os.kill(saver.writer.pid or 0, signal.SIGCONT)
        with pytest.raises(SaveError) as failure:
            saver.finish()
        return str(failure.value)

    messages = on_two_ranks(body, tmp_path, on_save_error="stop")
    assert all(".lease belongs to another run by now: two runs write into one folder" in m for m in messages)
    assert _steps(tmp_path) == [1]


def test_a_run_whose_folder_was_taken_over_ends(tmp_path: Path, on_two_ranks: Run) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> None:
        groups.barrier()
        if groups.rank == 0:
            (root / LEASE_FILE).unlink()
            other = Lease(root, "two", beat_s=0.05)
        with pytest.raises(LeaseError, match=f"{root} is being written by another run"):
            _begin(saver, groups, 1)
        if groups.rank == 0:
            other.close()

    on_two_ranks(body, tmp_path)


def test_a_piece_that_no_rank_wrote_is_an_error(tmp_path: Path, on_two_ranks: Run) -> None:
    def body(saver: Saver, groups: ProcessGroups, root: Path) -> str:
        saver.begin(1, lambda: _files(0, 1) if groups.rank == 0 else [])
        with pytest.raises(SaveError) as failure:
            saver.finish()
        return str(failure.value)

    for message in on_two_ranks(body, tmp_path, on_save_error="stop"):
        assert "a has 16 elements, and the files hold 8 of it" in message
    assert _steps(tmp_path) == []


def test_continuing_says_what_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    groups = initialize(ParallelConfig(), lambda ranks: ranks[:1])
    try:
        (tmp_path / "file").write_text("")
        saver = Saver(CheckpointConfig(save=str(tmp_path / "file" / "root")), groups, "one", None)
        with caplog.at_level(logging.ERROR):
            _begin(saver, groups, 1)
        assert saver.failures == 1
        assert "the checkpoint of step 1 could not be written to" in caplog.text
        assert "training goes on, and the next one is written after the next interval" in caplog.text
        with pytest.raises(
            SaveError, match=r"the last checkpoint could not .*root \(messages above\).*: none\. See to the folder"
        ):
            saver.require_success()
        saver.failures = 2
        with pytest.raises(SaveError, match=r"the last 2 checkpoints could not be written"):
            saver.require_success()
        saver.close()
    finally:
        groups.destroy()


def test_configuration_of_checkpoints_is_checked() -> None:
    with pytest.raises(ValueError, match=r"checkpoint.save_timeout_minutes = 0; it must be positive"):
        dataclasses.replace(CheckpointConfig(), save_timeout_minutes=0)
    with pytest.raises(ValueError, match=r"checkpoint.keep_last = -1; it must not be negative"):
        dataclasses.replace(CheckpointConfig(), keep_last=-1)
    with pytest.raises(ValueError, match=r"checkpoint.keep_last = 1; .* would lose the run"):
        dataclasses.replace(CheckpointConfig(), keep_last=1)
