"""Proving checkpoints and corpora whole from the outside. Oracle: files damaged on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.checkpoint.shard_file import Region
from lcl_megatron.checkpoint.verification import verify_paths
from tests.checkpoint.test_reader import write_checkpoint
from tests.test_tools import run_tool
from tests.training.small_runs import DataFolder, plain_document


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, {"a": (np.zeros((4, 6), np.float32), [Region.whole((4, 6))])})


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(4)])
    data.preprocess()
    return data.corpus


def test_what_is_whole_is_said_and_counted(checkpoint: Path, corpus: Path) -> None:
    status, output = run_tool("verify", checkpoint.parent, checkpoint, corpus)
    assert status == 0, output
    *lines, last = output.splitlines()
    assert lines[0].startswith(f"{checkpoint}: checkpoint of step 1: whole, 3 files")
    assert lines[1] == lines[0]
    assert lines[2] == f"{corpus}: corpus of 4 documents and 8 images: whole"
    assert json.loads(last) == {"whole": 3, "damaged": 0}


def test_what_is_damaged_is_named(checkpoint: Path, corpus: Path, tmp_path: Path) -> None:
    (checkpoint / "part-0.safetensors").write_bytes(b"")
    with (corpus / "images.bin").open("r+b") as file:
        file.write(b"!")
    status, output = run_tool("verify", checkpoint, corpus, tmp_path / "absent")
    assert status == 1
    assert "part-0.safetensors holds 0 bytes instead of" in output
    assert "images.bin differ from the manifest" in output
    assert "absent is neither a checkpoint, nor a folder that holds some, nor a corpus" in output
    assert json.loads(output.splitlines()[-1]) == {"whole": 0, "damaged": 3}


def test_a_damaged_manifest_is_damage(checkpoint: Path, corpus: Path) -> None:
    for path in (checkpoint, corpus):
        (path / "manifest.json").write_text("{")
    assert [finding.is_whole for finding in verify_paths([checkpoint, corpus])] == [False, False]
