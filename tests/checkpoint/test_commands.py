"""``tools/convert_checkpoint.py import`` and ``official``. Oracle: the JSON in the last line; the files that are left,
read by their library; the weights that went in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lcl_megatron.checkpoint.commands import export, import_source, official
from lcl_megatron.checkpoint.convert.importing import ImportOptions
from lcl_megatron.checkpoint.convert.official_file import Heads
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.stock_libraries import LibraryError
from lcl_megatron.checkpoint.weights import read_weights, write_weights
from lcl_megatron.config.toml import from_toml
from tests.checkpoint.convert import stock_models
from tests.checkpoint.random_weights import random_weights, tiny_config
from tests.test_tools import ending_of

OFFICIAL = {"activation": "gelu", "tie_embeddings": False, "context_bias": False}
HEADS = Heads(vision=2, pool=4, language=2)


def test_encoder_becomes_a_folder_of_weights_that_was_verified(tmp_path: Path) -> None:
    stock_models.clip_vision_model().save_pretrained(tmp_path / "clip")
    outcome = import_source(f"clip:{tmp_path / 'clip'}", tmp_path / "out", ImportOptions(), verify=True)
    assert outcome.status == 0
    first, second, *checks, last = outcome.text.splitlines()
    assert first == f"{tmp_path / 'out'}: vision, 0.03 M parameters"
    assert second.startswith(f"train from it: pretrain_lcl.py --config {tmp_path / 'out'}/run.toml --init-weights ")
    assert [line.split()[1:] for line in checks] == [["ok", name] for name in ("clip", "round_trip", "written")]
    figures = json.loads(last)
    assert figures.keys() == {"clip", "round_trip", "written"}
    assert figures["round_trip"] == figures["written"] == 0.0
    assert 0.0 < figures["clip"] < 1e-5
    weights = read_weights(tmp_path / "out")
    assert weights.config.vision.activation == "quick_gelu"
    assert from_toml((tmp_path / "out" / "run.toml").read_text(), "run.toml").vision == weights.config.vision
    with pytest.raises(CheckpointError, match="exists; weights are never written over others"):
        import_source(f"clip:{tmp_path / 'clip'}", tmp_path / "out", ImportOptions())


def test_released_file_and_back_with_parts_and_another_image_size(tmp_path: Path) -> None:
    stock_models.library("open_clip")
    weights = random_weights(tiny_config({}, OFFICIAL), tokenizer=b"the tokenizer")
    write_weights(weights, tmp_path / "ours")
    outcome = official(tmp_path / "ours", tmp_path / "new" / "released.pt", "bf16", verify=True)
    assert outcome.status == 0, outcome.text
    assert json.loads(outcome.text.splitlines()[-1]).keys() == {"open_clip", "round_trip", "written"}
    assert torch.load(tmp_path / "new" / "released.pt")["state_dict"]["logit_scale"].dtype == torch.bfloat16

    options = ImportOptions(heads=HEADS, parts=("vision", "pool"), image_size=32)
    outcome = import_source(str(tmp_path / "new" / "released.pt"), tmp_path / "parts", options, verify=True)
    assert outcome.status == 0, outcome.text
    parts = read_weights(tmp_path / "parts")
    assert parts.parts == ("vision", "pool")
    assert parts.config.vision.image_size == 32
    assert parts.state["vision.embedding.position_embeddings"].shape == (17, 16)
    assert torch.equal(parts.state["pool.query"], weights.state["pool.query"].bfloat16().float())


def test_parts_of_our_own_weights_and_nothing_to_compare_without_verify(tmp_path: Path) -> None:
    weights = random_weights(tiny_config(), tokenizer=b"the tokenizer")
    write_weights(weights, tmp_path / "ours")
    outcome = import_source(str(tmp_path / "ours"), tmp_path / "out", ImportOptions(parts=("language",)))
    assert outcome.text.splitlines()[-1] == "{}"
    assert read_weights(tmp_path / "out").tokenizer == b"the tokenizer"
    outcome = import_source(str(tmp_path / "ours"), tmp_path / "pool", ImportOptions(parts=("pool",)), verify=True)
    assert json.loads(outcome.text.splitlines()[-1]) == {"written": 0.0}
    assert read_weights(tmp_path / "pool").tokenizer is None
    with pytest.raises(CheckpointError, match="the weights hold pool only, and not vision"):
        import_source(str(tmp_path / "pool"), tmp_path / "more", ImportOptions(parts=("vision",)))
    assert not (tmp_path / "more").exists()


def test_export_that_no_library_can_verify_says_that_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock_models.library("huggingface_hub")
    write_weights(random_weights(tiny_config()), tmp_path / "ours")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LibraryError, match=r"out is written, but --verify could not load it: timm cannot be imported"):
        export(tmp_path / "ours", tmp_path / "out", verify=True)
    assert (tmp_path / "out" / "export_report.json").is_file()


def test_import_needs_megatron_core_only_to_verify(tmp_path: Path) -> None:
    write_weights(random_weights(tiny_config({}, OFFICIAL)), tmp_path / "ours")
    code = f"""
import sys
sys.modules["megatron"] = None
from pathlib import Path
from lcl_megatron.checkpoint.commands import import_source, official
from lcl_megatron.checkpoint.convert.importing import ImportOptions
from lcl_megatron.checkpoint.convert.official_file import Heads
from lcl_megatron.checkpoint.stock_libraries import LibraryError
folder, options = Path({str(tmp_path)!r}), ImportOptions(heads=Heads(vision=2, pool=4, language=2))
official(folder / "ours", folder / "released.pt")
import_source(str(folder / "released.pt"), folder / "out", options)
for run in (
    lambda: import_source(str(folder / "released.pt"), folder / "verified", options, verify=True),
    lambda: official(folder / "ours", folder / "verified.pt", verify=True),
):
    try:
        run()
    except LibraryError as error:
        print(error)
"""
    stock_models.library("open_clip")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    message = "--verify compares with the model's own outputs and needs megatron.core; install megatron-core, or leave"
    assert result.stdout.count(message) == 2
    assert read_weights(tmp_path / "out").parts == ("vision", "pool", "language", "logit_scale")
    assert not (tmp_path / "verified").exists()


def test_tool_has_the_flags_and_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_weights(random_weights(tiny_config()), tmp_path / "ours")
    out, released = tmp_path / "out", tmp_path / "x.pt"
    flags = ("--parts", "vision", "pool", "--image-size", 24, "--heads.vision", 2)
    assert ending_of("convert_checkpoint", monkeypatch, "import", tmp_path / "ours", out, *flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "{}"
    assert read_weights(out).config.vision.image_size == 24
    assert ending_of("convert_checkpoint", monkeypatch, "official", tmp_path / "ours", released) == 1
    assert "convert_checkpoint: the released code cannot run this model:\n" in capsys.readouterr().err
    assert ending_of("convert_checkpoint", monkeypatch, "import", tmp_path / "absent", tmp_path / "y") == 1
    assert "there is no such file or folder" in capsys.readouterr().err
    assert not released.exists()
