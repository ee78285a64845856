"""Files of tensors. Oracles: the tensors themselves, and the permissions of a file that ``open`` makes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lcl_megatron.checkpoint.tensor_files import write_tensors


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_whoever_may_read_other_files_may_read_these(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "model.safetensors"
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    before = os.umask(mask)
    try:
        write_tensors({"old": torch.zeros(9)}, path)
        write_tensors(state, path)
        (tmp_path / "other").write_text("x")
    finally:
        os.umask(before)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert [file.name for file in tmp_path.iterdir() if file.name != "other"] == [path.name]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {
            name: tensor.tolist() for name, tensor in state.items()
        }


def test_missing_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing/model\.safetensors"):
        write_tensors({"a": torch.zeros(1)}, tmp_path / "missing" / "model.safetensors")
