"""Code that users copy: docs/export.md and the model card, run from top to bottom on a tiny export.

Oracle: that it runs, and what the names that it leaves behind hold.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_megatron.checkpoint.export import export_weights
from lcl_megatron.checkpoint.weights import write_weights
from lcl_megatron.data.tokenizer import Tokenizer
from tests.checkpoint.random_weights import random_weights, tiny_config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def folder(transformers: ModuleType, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with what the documentation names."""
    monkeypatch.chdir(tmp_path)
    weights = random_weights(tiny_config(language={"vocab_size": tokenizer.vocab_size}), tokenizer=tokenizer.model)
    write_weights(weights, tmp_path / "RUN" / "checkpoints")
    export_weights(weights, tmp_path / "EXPORT", include_whole_model=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.jpg")
    return tmp_path


def run(text: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run all Python blocks of a text, one after the other."""
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    return names


def test_code_of_the_documentation_runs(folder: Path) -> None:
    names = run((ROOT / "docs" / "export.md").read_text(encoding="utf-8"), {})
    assert names["tokens"].shape == (1, 5, 16)
    assert names["mean"].shape == (1, 16)
    assert names["patches"].shape == (1, 4, 16)
    assert names["classifier"].timm_model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    read, copied = names["tower"].state_dict(), names["dialogue"].model.vision_tower.state_dict()
    assert all(torch.equal(copied[name], tensor) for name, tensor in read.items())
    assert names["images"].norm() == pytest.approx(1, abs=1e-5)
    assert (folder / "WEIGHTS" / "model.safetensors").is_file()
    # Code that is imported already goes before the folder's own, which test_whole_model.py runs.
    assert type(names["model"]).__module__ == "lcl_megatron.hf.modeling_lcl"


def test_code_of_the_model_card_runs(folder: Path) -> None:
    names = run((folder / "EXPORT" / "README.md").read_text(encoding="utf-8"), {})
    assert names["tokens"].shape == (1, 5, 16)
    assert names["patches"].shape == (1, 4, 16)
    assert type(names["model"]).__module__ == "lcl_megatron.hf.modeling_lcl"


def test_documentation_names_every_file_of_an_export(folder: Path) -> None:
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    shutil.rmtree(folder / "EXPORT" / "lcl")
    for path in (folder / "EXPORT").iterdir():
        assert path.name in text, path.name
