"""Files and folders that are whole or absent. Oracle: what is on disk afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcl_megatron.checkpoint.durable_files import commit_folder, replace_text


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "made" / "outcome.json"
    for text in ("first", "second, \u00e4 longer one"):
        replace_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    replace_text(path, "old")
    (tmp_path / ".outcome.json.tmp").mkdir()
    with pytest.raises(OSError, match=r"\.outcome\.json\.tmp"):
        replace_text(path, "new")
    assert path.read_text() == "old"


def test_a_folder_gets_its_name_with_all_that_is_in_it(tmp_path: Path) -> None:
    staging = tmp_path / ".staging-export"
    (staging / "inner").mkdir(parents=True)
    (staging / "inner" / "file").write_text("content")
    commit_folder(staging, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "inner" / "file").read_text() == "content"


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    staging, final = tmp_path / ".staging-export", tmp_path / "export"
    for folder in (staging, final):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with pytest.raises(OSError, match="export"):
        commit_folder(staging, final)
    assert (final / "file").read_text() == "export"
