"""Exports as a user makes them. Oracles: the files on disk, read by json and safetensors; exit statuses; the bits of an
export of the same weights from another layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.convert.clip_vision import fold_layer_scale
from lcl_megatron.checkpoint.convert.official import to_official
from lcl_megatron.checkpoint.convert.opt import from_opt
from lcl_megatron.checkpoint.convert.timm_vit import from_timm, to_timm
from lcl_megatron.checkpoint.convert.whole_model import from_whole_model
from lcl_megatron.checkpoint.export import export_weights
from lcl_megatron.checkpoint.folders import Progress
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.model_card import figures
from lcl_megatron.checkpoint.parameters import parameter_shapes
from lcl_megatron.checkpoint.weights import ModelWeights, check_parameters, read_weights, write_weights
from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import to_toml
from lcl_megatron.data.tokenizer import PIECES, Tokenizer
from tests.checkpoint import runs
from tests.checkpoint.random_weights import PROGRESS, random_weights, tiny_config
from tests.checkpoint.runs import CONFIG, Layout
from tests.distributed import run_distributed

pytest.importorskip("huggingface_hub", reason="writes model cards")

TOOL = Path(__file__).parents[3] / "tools" / "convert_checkpoint.py"
ONE = Layout("one")
TP2_PP2 = Layout("tp2 x pp2", tp=2, sequence_parallel=True, cuts=("language.1",))
BF16 = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, precision="bf16"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def weights_folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    config = tiny_config(language={"vocab_size": tokenizer.vocab_size})
    write_weights(random_weights(config, tokenizer=tokenizer.model), tmp_path / "weights")
    return tmp_path / "weights"


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(caught.value.code or 0)


def test_tool_verifies_and_ends_with_one_json_line(
    transformers: ModuleType,
    weights_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "export"
    assert run_tool(monkeypatch, "export", weights_folder, output, "--whole-model", "--verify") == 0
    differences = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(differences) == ["timm", "auto_model", "clip_vision", "language_model", "whole_model", "round_trip"]
    assert differences.pop("round_trip") == 0.0
    assert all(0 <= difference < 1e-5 for difference in differences.values())
    report = json.loads((output / "export_report.json").read_text())
    assert {name: one["max_abs_difference"] for name, one in report["measurements"].items()} == differences
    assert all(one["passed"] and one["missing_keys"] == [] for one in report["measurements"].values())
    assert report["versions"]["transformers"] == transformers.__version__
    assert report["source"]["step"] == PROGRESS.step
    config = read_weights(weights_folder).config
    assert report["source"]["config_sha256"] == hashlib.sha256(to_toml(config).encode()).hexdigest()

    # A second time: nothing is written over.
    before = contents(output)
    assert run_tool(monkeypatch, "export", weights_folder, output) == 1
    assert "export exists; an export is never written over another: name another folder" in capsys.readouterr().err
    assert contents(output) == before


def test_tool_fails_when_a_library_computes_something_else(
    transformers: Any,
    weights_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a release of transformers would that changed OPT's activation."""
    monkeypatch.setitem(transformers.activations.ACT2FN, "relu", torch.nn.GELU)
    assert run_tool(monkeypatch, "export", weights_folder, tmp_path / "export", "--verify") == 1
    output = capsys.readouterr().out
    assert "BEYOND TOLERANCE  language_model" in output
    assert json.loads(output.splitlines()[-1])["language_model"] > 1e-3
    report = json.loads((tmp_path / "export" / "export_report.json").read_text())
    assert [name for name, one in report["measurements"].items() if not one["passed"]] == ["language_model"]


def test_tool_names_what_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_tool(monkeypatch, "export", tmp_path, tmp_path / "export") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"convert_checkpoint: {tmp_path} is neither a folder of weights")
    assert "Traceback" not in error


def test_without_verify_figures_are_open_and_the_whole_model_is_left_out(weights_folder: Path, tmp_path: Path) -> None:
    report = export_weights(read_weights(weights_folder), tmp_path / "export")
    assert report.differences == {
        "timm": None,
        "auto_model": None,
        "clip_vision": None,
        "language_model": None,
        "whole_model": None,
        "round_trip": 0.0,
    }
    assert sorted(contents(tmp_path / "export")) == [
        "README.md",
        "clip_vision/config.json",
        "clip_vision/model.safetensors",
        "clip_vision/preprocessor_config.json",
        "config.json",
        "export_report.json",
        "language_model/config.json",
        "language_model/generation_config.json",
        "language_model/model.safetensors",
        "language_model/tokenizer.json",
        "language_model/tokenizer_config.json",
        "lcl_heads.safetensors",
        "model.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "weights"]


def test_every_parameter_can_be_read_back_from_the_export(weights_folder: Path, tmp_path: Path) -> None:
    weights = read_weights(weights_folder)
    export_weights(weights, tmp_path / "export", include_whole_model=True)
    vision = from_timm(load_file(tmp_path / "export" / "model.safetensors"), weights.config)
    language = from_opt(load_file(tmp_path / "export" / "language_model" / "model.safetensors"), weights.config)
    heads = load_file(tmp_path / "export" / "lcl_heads.safetensors")
    parts = vision | language | heads
    check_parameters(parts, weights.config)
    whole = from_whole_model(load_file(tmp_path / "export" / "lcl" / "model.safetensors"), weights.config)
    check_parameters(whole, weights.config)
    vocab = weights.config.language.vocab_size
    for name, tensor in weights.state.items():
        rows = vocab if name.endswith("word_embeddings.weight") else None
        assert torch.equal(parts[name][:rows], tensor[:rows]), name
        assert torch.equal(whole[name][:rows], tensor[:rows]), name
        if rows:
            assert not parts[name][rows:].any()


def test_layouts_agree_with_the_released_codes_names() -> None:
    """Both tables were written apart: [q; k; v] in timm is [q; k; v] in the released code."""
    config = tiny_config(
        {"layer_scale_init": None}, {"tie_embeddings": False, "context_bias": False, "activation": "gelu"}
    )
    state = random_weights(config).state
    official, timm = to_official(state, config), to_timm(state, config)
    for index in range(2):
        released = official[f"visual.transformer.resblocks.{index}.attn.in_proj_weight"]
        assert torch.equal(timm[f"blocks.{index}.attn.qkv.weight"], released)


def test_folding_multiplies_layer_scale_into_the_layer_before() -> None:
    config = tiny_config()
    state = random_weights(config).state
    folded = fold_layer_scale(state)
    plain = dataclasses.replace(config, vision=dataclasses.replace(config.vision, layer_scale_init=None))
    assert folded.keys() == parameter_shapes(plain, ["vision"]).keys()
    name = "vision.layers.1.mlp.linear_fc2"
    gamma = state["vision.layers.1.mlp_bda.gamma"]
    x = torch.randn(5, 40)
    product = gamma * torch.nn.functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
    found = torch.nn.functional.linear(x, folded[f"{name}.weight"], folded[f"{name}.bias"])
    assert (found - product).abs().max() < 1e-6


def test_bf16_weights_are_exported_as_they_are(tmp_path: Path) -> None:
    weights = random_weights(tiny_config(), dtype=torch.bfloat16)
    assert export_weights(weights, tmp_path / "export").differences["round_trip"] == 0.0
    assert {tensor.dtype for tensor in load_file(tmp_path / "export" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_what_a_container_cannot_hold_is_skipped_and_said(tmp_path: Path) -> None:
    config = tiny_config({"layernorm_epsilon": 1e-3, "class_token": False}, {"layernorm_epsilon": 1e-6})
    report = export_weights(random_weights(config), tmp_path / "export", include_whole_model=True)
    reasons = {name: folder.skipped for name, folder in report.folders.items()}
    assert reasons == {
        "vision": "timm's Vision Transformers have LayerNorms of epsilon 1e-05 or 1e-06; "
        "vision.layernorm_epsilon = 0.001",
        "clip_vision": "CLIPVisionModel has a class token; vision.class_token = False",
        "language_model": "OPT's LayerNorms have epsilon 1e-05; language.layernorm_epsilon = 1e-06",
        "whole_model": "there is no tokenizer, so nothing says which token stands for an image",
    }
    assert sorted(contents(tmp_path / "export")) == ["README.md", "export_report.json", "lcl_heads.safetensors"]
    card = (tmp_path / "export" / "README.md").read_text()
    assert all(f"no folder for `{name}`: {reason}" in card for name, reason in reasons.items())
    assert "timm.create_model" not in card


def test_language_model_without_a_tokenizer_names_no_tokens(tmp_path: Path) -> None:
    export_weights(random_weights(tiny_config()), tmp_path / "export")
    folder = tmp_path / "export" / "language_model"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3


def test_missing_library_is_named_before_anything_is_written(
    weights_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert run_tool(monkeypatch, "export", weights_folder, tmp_path / "export") == 1
    assert "convert_checkpoint: huggingface_hub cannot be imported" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    weights = random_weights(tiny_config(language={"vocab_size": 300}), tokenizer=tokenizer.model)
    with pytest.raises(CheckpointError, match=rf"the tokenizer has {tokenizer.vocab_size} token ids, the model 300;"):
        export_weights(weights, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_that_transformers_has_not_costs_only_the_language_model(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 50),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=290,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        pad_piece=PIECES["pad"],
        control_symbols=[PIECES["boi"], PIECES["eoi"], PIECES["image"]],
        minloglevel=2,
    )
    weights = random_weights(tiny_config(), tokenizer=(tmp_path / "unigram.model").read_bytes())
    report = export_weights(weights, tmp_path / "export", include_whole_model=True)
    skipped = {name: folder.skipped for name, folder in report.folders.items() if folder.skipped}
    assert skipped.keys() == {"language_model", "whole_model"}
    assert all("the tokenizer is not a byte-pair encoding, so" in str(reason) for reason in skipped.values())


def test_model_card_says_what_was_trained_on_what(weights_folder: Path, tmp_path: Path) -> None:
    weights = read_weights(weights_folder)
    config = dataclasses.replace(
        weights.config,
        data=dataclasses.replace(
            weights.config.data, data_path=("/data/laion", "/data/mmc4"), mixture_weights=(1.0, 3.0), view=("pairs",)
        ),
    )
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 5.0, "loss/generation": 9.5}\n'
        '{"step": 20, "time": 6.0, "loss/generation": 2.25}\n'
        '{"step": '
    )
    (tmp_path / "probe.json").write_text(
        json.dumps(
            [{"encoder": "trained", "knn": {"value": 0.75}, "ok": True, "curves": {"x": 1.0}, "bad": float("nan")}]
        )
    )
    export_weights(
        dataclasses.replace(weights, config=config),
        tmp_path / "export",
        metrics=(tmp_path / "metrics.jsonl", tmp_path / "probe.json"),
    )
    card = (tmp_path / "export" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    for line in (
        "| corpora | `laion`, `mmc4` |",
        "| shares, by images | 1 : 3 |",
        "| view | pairs |",
        "| optimizer steps | 7 |",
        "| images | 91 |",
        "| corpus 0 | abc |",
        "| `vision.layer_scale_init` | 0.1 |",
        "| at step 20: loss/generation | 2.25 |",
        "| trained: knn: value | 0.75 |",
    ):
        assert line in card, line
    assert "9.5" not in card
    assert card.count("data.layout") == 1
    assert "curves" not in card
    assert "/data/" not in card


def test_model_card_of_imported_weights_claims_no_training(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    export_weights(ModelWeights(weights.config, weights.state), tmp_path / "export")
    assert "weights that were imported" in (tmp_path / "export" / "README.md").read_text()


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("a.json", '{"name": "x"}'), ("a.jsonl", "x\ny\n")])
def test_files_without_figures_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{name} holds no figures.*give metrics.jsonl of a run or JSON results"):
        figures(tmp_path / name)


def test_long_results_are_cut_and_counted(tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text(json.dumps({f"m{index}": index for index in range(75)}))
    assert figures(tmp_path / "long.json")[-1] == ("and 15 more", "")


@pytest.mark.parametrize("damage", ["lose", "add"])
def test_tensors_of_another_architecture_are_refused(damage: str, tmp_path: Path) -> None:
    config = tiny_config()
    tensors = to_timm(random_weights(config).state, config)
    if damage == "lose":
        del tensors["cls_token"]
        message = "absent cls_token, unknown nothing; compare depth, class token and LayerScale with the configuration"
    else:
        tensors |= {f"blocks.{index}.norm3.weight": torch.ones(1) for index in range(7)}
        message = "absent nothing, unknown blocks.0.norm3.weight, .* and 2 more; compare depth"
    save_file(tensors, tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        from_timm(load_file(tmp_path / "x"), config)


def _train_and_save(rank: int, world_size: int, config: RunConfig, folder: Path) -> None:
    trainable = runs.build(config)
    runs.train(trainable, range(2))
    native.save(folder, trainable, Progress(step=2), b"")


def _save_in_another_layout(rank: int, world_size: int, config: RunConfig, source: Path, folder: Path) -> None:
    trainable = runs.build(config)
    native.save(folder, trainable, native.load(source, trainable), b"")


@pytest.mark.parametrize("config", [CONFIG, BF16], ids=["fp32", "bf16"])
def test_layout_of_the_run_changes_no_bit_of_the_export(config: RunConfig, tmp_path: Path) -> None:
    """One process against tensor parallel x pipeline parallel, with both copies of the tied matrix."""
    one, four = tmp_path / "one" / "step-00000002", tmp_path / "four" / "step-00000002"
    run_distributed(_train_and_save, 1, ONE.apply(config), one.parent)
    run_distributed(_save_in_another_layout, 4, TP2_PP2.apply(config), one, four.parent)
    exports = []
    for checkpoint in (one, four):
        (checkpoint / "tokenizer.model").unlink()
        export_weights(read_weights(checkpoint), checkpoint.parent / "export", "x")
        exports.append(contents(checkpoint.parent / "export"))
    # It holds the hash of the configuration, the layout included.
    first, second = (json.loads(export.pop("export_report.json")) for export in exports)
    assert exports[0] == exports[1]
    assert first["source"].pop("config_sha256") != second["source"].pop("config_sha256")
    assert first == second
