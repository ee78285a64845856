"""The ``official`` recipe against the released model. Oracles: recorded passes of the released code itself, where they
are at hand; and an independent plain-torch model of it (``tests/reference_lcl.py``) with other sizes.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcl_megatron.checkpoint.reference_case import ReferenceCase, compare
from tests.reference_lcl import ReferenceLCL, Sizes, record_case

ROOT = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("LCL_SHARED_GOLDEN", ROOT.parent / "shared" / "golden"))
CASES = {
    # Image first, text first, several images; documents of different length.
    "interleaved": (Sizes(), [(4, 0, 7), (0, 9), (3, 0, 2, 0, 5), (0, 0, 6), (2, 0)]),
    # One layer each, one head, a single patch row, no image at the row's begin.
    "small": (
        Sizes(
            image_size=8,
            patch_size=4,
            vision_width=16,
            vision_layers=1,
            vision_head_width=16,
            text_width=24,
            text_layers=1,
            text_heads=1,
            pool_heads=1,
            vocab_size=33,
            context_length=40,
        ),
        [(5, 0, 1), (1, 0, 12), (2, 0, 3)],
    ),
}


def _failures(path: Path) -> list[str]:
    return [f"{c.name}: {c.error:.1e}" for c in compare(ReferenceCase.load(path)) if not c.passed]


@pytest.mark.parametrize("name", ["pairs", "interleaved"])
def test_official_recipe_equals_recorded_pass_of_the_released_code(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no recorded case at {path}; set LCL_SHARED_GOLDEN to the folder that holds them")
    assert _failures(path) == []


@pytest.mark.parametrize("name", ["pairs", "interleaved"])
def test_reference_model_equals_recorded_pass_of_the_released_code(name: str) -> None:
    """The oracle of the other tests is itself right."""
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no recorded case at {path}; set LCL_SHARED_GOLDEN to the folder that holds them")
    case = ReferenceCase.load(path)
    vision, text = case.description["config"]["vision"], case.description["config"]["text"]
    model = ReferenceLCL(
        Sizes(
            vision["image_size"],
            vision["patch_size"],
            vision["width"],
            vision["layers"],
            vision["head_width"],
            text["width"],
            text["layers"],
            text["heads"],
            case.description["config"]["heads"],
            text["vocab_size"],
            text["context_length"],
        )
    )
    assert model.sizes.special == case.description["special_token_ids"]
    model.load_state_dict(case.group("weight"), strict=True)
    outputs = model(case.tensors["input.images"], case.tensors["input.tokens"])
    for key in ("generation_loss", "contrastive_loss"):
        assert outputs[key].item() == pytest.approx(case.description[key], rel=1e-5)
    for key, recorded in case.group("output").items():
        torch.testing.assert_close(outputs[key], recorded, rtol=1e-4, atol=1e-5 * float(recorded.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_official_recipe_equals_independent_model(name: str, tmp_path: Path) -> None:
    path = record_case(tmp_path, name, *CASES[name])
    assert _failures(path) == []


def test_comparison_covers_every_output_loss_and_weight(tmp_path: Path) -> None:
    path = record_case(tmp_path, "small", *CASES["small"])
    names = {c.name.removesuffix(" (zero but for rounding)") for c in compare(ReferenceCase.load(path))}
    tensors = load_file(path).keys()
    expected = {name for name in tensors if name.startswith(("output.", "grad."))}
    assert names == expected | {"loss", "generation_loss", "contrastive_loss"}
    assert {n.removeprefix("grad.") for n in expected if n.startswith("grad.")} == {
        n.removeprefix("weight.") for n in tensors if n.startswith("weight.")
    }


def test_case_without_its_description_says_what_is_missing(tmp_path: Path) -> None:
    path = record_case(tmp_path, "small", *CASES["small"])
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"small\.json does not exist; a case is NAME\.safetensors with NAME"):
        ReferenceCase.load(path)


@pytest.mark.parametrize("weight", ["visual.conv1.weight", "text.transformer.resblocks.0.mlp.c_proj.bias"])
def test_one_changed_entry_of_one_weight_is_found(weight: str, tmp_path: Path) -> None:
    path = record_case(tmp_path, "small", *CASES["small"])
    tensors = load_file(path)
    tensors[f"weight.{weight}"].flatten()[0] += 0.01
    save_file(tensors, path)
    assert _failures(path)


def test_tool_prints_errors_and_exits_with_1_only_beyond_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = record_case(tmp_path, "good", *CASES["small"])
    bad = record_case(tmp_path, "bad", *CASES["small"])
    tensors = load_file(bad)
    tensors["grad.logit_scale"] *= 1.001
    save_file(tensors, bad)

    def run_tool(*cases: Path) -> tuple[object, list[str]]:
        monkeypatch.setattr(sys, "argv", ["check_reference.py", *map(str, cases)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "check_reference.py"), run_name="__main__")
        return end.value.code, capsys.readouterr().out.splitlines()

    status, lines = run_tool(good)
    assert status == 0
    assert "0 beyond tolerance" in lines[-1]
    status, lines = run_tool(good, bad)
    assert status == 1
    assert "1 beyond tolerance" in lines[-1]
    (line,) = [line for line in lines if "BEYOND" in line]
    assert line.split()[-1] == "grad.logit_scale"
