"""Which checkpoint a run goes on from. Oracles: folders damaged on purpose; two ranks that must choose alike."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.checkpoint import manifest
from lcl_megatron.checkpoint.folders import CONFIG_FILE
from lcl_megatron.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointError,
    DamagedCheckpointError,
    Manifest,
    write_file,
)
from lcl_megatron.config import CheckpointConfig, ParallelConfig, RunConfig
from lcl_megatron.parallel.groups import initialize
from lcl_megatron.training.resume import changed_settings, checkpoint_to_resume
from tests.distributed import run_distributed


def _checkpoints(root: Path, *steps: int) -> None:
    for step in steps:
        folder = root / f"step-{step:08d}"
        folder.mkdir(parents=True)
        contents = {"a": bytes([step] * 50), "b": b"b", CONFIG_FILE: b"", "state.json": b"{}"}
        files = {name: write_file(folder / name, content) for name, content in contents.items()}
        (folder / MANIFEST_FILE).write_text(Manifest(step, "x", files).text())


def _damage(root: Path, step: int, name: str) -> None:
    path = root / f"step-{step:08d}" / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def _chosen(rank: int, world_size: int, config: CheckpointConfig) -> Any:
    groups = initialize(ParallelConfig(), lambda ranks: ranks[:1])
    try:
        found = checkpoint_to_resume(config, groups)
    except CheckpointError as error:
        return error
    return None if found is None else found.relative_to(Path(config.save).parent).as_posix()


def choose(root: Path, **fields: Any) -> Any:
    """Return what both ranks choose, which is the same."""
    config = CheckpointConfig(
        save=str(root / "save"), load=str(root / "load") if (root / "load").exists() else "", **fields
    )
    one, other = run_distributed(_chosen, 2, config)
    assert repr(one) == repr(other)
    return one


def test_the_newest_of_the_runs_own_folder_comes_before_what_it_began_from(tmp_path: Path) -> None:
    assert choose(tmp_path) is None
    _checkpoints(tmp_path / "load", 90)
    assert choose(tmp_path) == "load/step-00000090"
    _checkpoints(tmp_path / "save", 2, 3)
    assert choose(tmp_path) == "save/step-00000003"


def test_an_empty_folder_to_load_from_is_refused(tmp_path: Path) -> None:
    (tmp_path / "load").mkdir()
    assert "no complete checkpoint (step-NNNNNNNN) there" in str(choose(tmp_path))


@pytest.mark.parametrize("name", ["a", "b", "state.json", MANIFEST_FILE])
def test_a_damaged_one_is_put_aside_and_the_one_before_used(name: str, tmp_path: Path) -> None:
    """Whichever rank reads the file: files are dealt to both."""
    save = tmp_path / "save"
    _checkpoints(save, 2, 3, 4)
    for step in (4, 3):
        _damage(save, step, name)
    assert choose(tmp_path) == "save/step-00000002"
    names = [".damaged-step-00000003", ".damaged-step-00000004", "step-00000002"]
    assert sorted(path.name for path in save.iterdir()) == names
    # It happens again, to the same step.
    _checkpoints(save, 3)
    _damage(save, 3, name)
    assert choose(tmp_path) == "save/step-00000002"
    assert (save / ".damaged-step-00000003-1").is_dir()


def test_a_damaged_one_of_another_run_stays_where_it_is(tmp_path: Path) -> None:
    load = tmp_path / "load"
    _checkpoints(load, 2, 3)
    _damage(load, 3, "a")
    assert choose(tmp_path) == "load/step-00000002"
    assert sorted(path.name for path in load.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_run_does_not_begin_anew_when_all_are_damaged(tmp_path: Path) -> None:
    _checkpoints(tmp_path / "load", 90)
    _checkpoints(tmp_path / "save", 2, 3)
    _damage(tmp_path / "save", 2, "a")
    (tmp_path / "save" / "step-00000003" / "b").unlink()
    refusal = choose(tmp_path)
    assert isinstance(refusal, DamagedCheckpointError)
    assert "step-00000003 is damaged: b cannot be read: No such file or directory" in str(refusal)
    assert "step-00000002 is damaged: a was changed after it was written" in str(refusal)
    assert "does not begin anew by itself" in str(refusal)
    # Nor when a launcher starts it again.
    assert str(choose(tmp_path)) == str(refusal)


def test_without_verification_only_the_manifest_is_read(tmp_path: Path) -> None:
    _checkpoints(tmp_path / "save", 2, 3)
    _damage(tmp_path / "save", 3, "a")
    assert choose(tmp_path, verify_checkpoint=False) == "save/step-00000003"
    _damage(tmp_path / "save", 3, MANIFEST_FILE)
    assert choose(tmp_path, verify_checkpoint=False) == "save/step-00000002"


def test_what_one_node_cannot_read_for_a_while_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one before is used, and nothing is put aside; the file system of one rank fails."""
    save = tmp_path / "save"
    _checkpoints(save, 2, 3)
    real = manifest.file_sha256
    failing = save / "step-00000003" / "b"

    def refusing(path: Path) -> str:
        if path == failing:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(manifest, "file_sha256", refusing)
    monkeypatch.setattr(manifest, "_SECONDS_BETWEEN_READS", 0.01)
    assert choose(tmp_path) == "save/step-00000002"
    assert sorted(path.name for path in save.iterdir()) == ["step-00000002", "step-00000003"]
    with pytest.raises(manifest.UnreadableCheckpointError, match="b cannot be read: Input/output error"):
        manifest.verify(save / "step-00000003")
    monkeypatch.setattr(manifest, "file_sha256", real)
    assert choose(tmp_path) == "save/step-00000003"


def test_a_checkpoint_of_another_version_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _checkpoints(tmp_path / "save", 2)
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 99)
    _checkpoints(tmp_path / "save", 3)
    monkeypatch.undo()
    refusal = choose(tmp_path)
    assert "format ('lcl_megatron checkpoint', 99)" in str(refusal)
    assert "take the version that wrote it" in str(refusal)
    assert (tmp_path / "save" / "step-00000003").is_dir()


def test_settings_that_have_changed_are_told() -> None:
    before = RunConfig()
    now = dataclasses.replace(
        before,
        optimizer=dataclasses.replace(before.optimizer, lr=1e-4),
        checkpoint=CheckpointConfig(save="elsewhere"),
    )
    assert changed_settings(before, before) == []
    assert changed_settings(before, now) == ["optimizer.lr: 0.0003 in the checkpoint, 0.0001 now"]
