"""What is said of refused pickles. Oracles: the errors of torch, numpy and timm themselves."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lcl_megatron.checkpoint.refused_pickles import is_refused_pickle, what_failed
from tests.payloads import PICKLES, Mark


@pytest.mark.parametrize(
    ("name", "named"), [("reduce", f"({os.mkdir.__module__}.mkdir)"), ("exec", "(exec)"), ("frames", "")]
)
def test_torch_s_advice_is_left_out(name: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match="weights_only") as caught:
        torch.load(io.BytesIO(PICKLES[name](Mark(tmp_path))), weights_only=True)
    said = what_failed(caught.value)
    assert said.startswith("it holds other things than tensors")
    assert said.endswith("which are not unpickled")
    assert named in said
    assert "weights_only" not in said


def test_numpy_s_advice_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="allow_pickle") as caught:
        np.load(io.BytesIO(PICKLES["reduce"](Mark(tmp_path))), allow_pickle=False)
    assert what_failed(caught.value) == "it holds other things than tensors, which are not unpickled"


def test_other_errors_keep_their_words() -> None:
    error = OSError("no such file")
    assert not is_refused_pickle(error)
    assert what_failed(error) == "no such file"
