"""How a run says that it ends. Oracles: the messages and statuses written out by hand; the json module."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import ConfigError
from lcl_megatron.data.storage.indexed_file import CorpusError
from lcl_megatron.training.bad_images import TooManyBadImagesError
from lcl_megatron.training.ending import Ending, ExitStatus
from lcl_megatron.training.failure import STATUSES, exit_status, status_of
from lcl_megatron.training.step import NonFiniteError


@pytest.mark.parametrize(
    ("ending", "checkpoint", "status", "line"),
    [
        (
            Ending(step=123, train_iters=1000, reason="SIGTERM", was_requested=True),
            "runs/step-00000123",
            75,
            "stopped by SIGTERM at step 123 of 1000; saved runs/step-00000123; start the same command again to go on",
        ),
        (
            Ending(step=500, train_iters=1000, reason="--exit-interval 500"),
            "",
            0,
            "stopped by --exit-interval 500 at step 500 of 1000; nothing is saved without --save: the same command "
            "would begin anew",
        ),
        (
            Ending(step=1000, train_iters=1000, reason="SIGUSR1", was_requested=True),
            "runs/step-00001000",
            0,
            "finished at step 1000 of 1000; saved runs/step-00001000",
        ),
        (Ending(step=8, train_iters=8), "", 0, "finished at step 8 of 8"),
    ],
)
def test_an_ending_has_a_status_and_a_line(ending: Ending, checkpoint: str, status: int, line: str) -> None:
    assert ending.status == status
    assert ending.describe(checkpoint) == line


def test_the_outcome_is_left_in_the_folder_of_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "save"
    Ending(step=3, train_iters=8, save=str(folder), reason="stop file", was_requested=True).write()
    assert [path.name for path in folder.iterdir()] == ["outcome.json"]
    assert json.loads((folder / "outcome.json").read_text()) == {
        "outcome": "stopped",
        "step": 3,
        "train_iters": 8,
        "save": str(folder),
        "reason": "stop file",
        "was_requested": True,
        "status": 75,
    }
    Ending(step=8, train_iters=8, save=str(folder)).write()
    assert json.loads((folder / "outcome.json").read_text())["outcome"] == "finished"


def test_nothing_is_left_without_a_place_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Ending(step=8, train_iters=8).write()
    assert list(tmp_path.iterdir()) == []


def _fail(error: Exception) -> ExitStatus:
    raise error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("no such flag"), 2),
        (NonFiniteError("the norm is nan"), 76),
        (CorpusError("shard 3 is short"), 77),
        (TooManyBadImagesError("half of them"), 77),
        (CheckpointError("other data"), 79),
    ],
)
def test_an_explained_error_is_one_line_and_a_status(
    error: Exception, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(lambda: _fail(error)) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_derived_from_an_explained_one_has_its_status() -> None:
    special = type("DamagedError", (CheckpointError,), {})
    assert status_of(special("bit 3")) == 79


def test_no_class_hides_a_more_special_one_behind_it() -> None:
    kinds = [kind for kind, _ in STATUSES]
    hidden = [late.__name__ for i, late in enumerate(kinds) for early in kinds[:i] if issubclass(late, early)]
    assert hidden == []


def test_other_ranks_wait_for_rank_0_and_then_say_who_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    begin = time.monotonic()
    assert exit_status(lambda: _fail(ConfigError("no such disk")), seconds_for_rank_0=0.2) == 2
    assert time.monotonic() - begin >= 0.2
    assert capsys.readouterr().err == "[rank 3] error: no such disk\n"


def test_unexplained_errors_keep_their_traceback() -> None:
    assert status_of(ZeroDivisionError()) == 1
    with pytest.raises(ZeroDivisionError):
        exit_status(lambda: _fail(ZeroDivisionError()))
