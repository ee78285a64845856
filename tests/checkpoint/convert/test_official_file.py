"""Files of the released code. Oracles: open_clip's own vision tower on the same weights; an independent plain-torch
model of the released code under its own parameter names; recorded weights of the released code, where they are at hand;
``torch.load`` and ``torch.equal``.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lcl_megatron.checkpoint.convert.importing import measure_released_file, only_parts, read_source
from lcl_megatron.checkpoint.convert.official_file import (
    Heads,
    infer_config,
    official_state,
    read_official,
    read_official_state,
    write_official,
)
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.reference_case import ReferenceCase
from lcl_megatron.checkpoint.weights import ModelWeights
from lcl_megatron.config.sources import load_run_config
from tests.checkpoint.convert import stock_models
from tests.checkpoint.random_weights import random_weights, tiny_config
from tests.reference_lcl import ReferenceLCL, Sizes

GOLDEN = Path(os.environ.get("LCL_SHARED_GOLDEN", Path(__file__).parents[4] / "shared" / "golden"))
SIZES = Sizes()
HEADS = Heads(vision=SIZES.vision_width // SIZES.vision_head_width, pool=SIZES.pool_heads, language=SIZES.text_heads)


@pytest.fixture
def released() -> dict[str, Tensor]:
    """Weights under the released names, every entry different."""
    model = ReferenceLCL(SIZES)
    model.randomize(5)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def _training_file(path: Path, state: dict[str, Tensor]) -> Path:
    """What the released training script saves."""
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 12, "name": "lcl", "state_dict": wrapped, "optimizer": optimizer.state_dict()}, path)
    return path


def _plain_file(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, path)
    return path


def _old_file(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
    return path


def _safetensors_file(path: Path, state: dict[str, Tensor]) -> Path:
    path = path.with_suffix(".safetensors")
    save_file(state, path)
    return path


@pytest.mark.parametrize("write", [_training_file, _plain_file, _old_file, _safetensors_file])
def test_every_sort_of_file_gives_the_same_model_and_goes_back_bit_by_bit(
    write: Any, released: dict[str, Tensor], tmp_path: Path
) -> None:
    weights = read_official(write(tmp_path / "in.pt", released), HEADS)
    vision, language = weights.config.vision, weights.config.language
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.ffn_hidden_size) == (20, 4, 40, 160)
    assert (vision.num_layers, vision.num_attention_heads, vision.layer_scale_init) == (3, 5, None)
    assert (language.vocab_size, language.padded_vocab_size, language.max_position_embeddings) == (77, 128, 96)
    assert (language.num_layers, language.hidden_size, language.num_attention_heads) == (2, 36, 3)
    assert weights.config.pool.num_attention_heads == 6
    assert weights.config.data.seq_length == 96
    assert not weights.state["language.output_projection.weight"][77:].any()
    write_official(weights, tmp_path / "out.pt")
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert content.keys() == {"state_dict"}
    _same(content["state_dict"], released)


def test_architecture_is_that_of_the_preset_when_sizes_are_its_own() -> None:
    """Names and shapes only: no memory is used."""
    preset = load_run_config(["--preset", "official_b16"])
    sizes = Sizes(224, 16, 768, 12, 64, 768, 12, 12, 12, 49411, 280)
    with torch.device("meta"):
        model = ReferenceLCL(sizes)
    assert infer_config(dict(model.named_parameters()), Heads(), "x") == preset


@pytest.mark.parametrize("name", ["pairs", "interleaved"])
def test_recorded_weights_of_the_released_code(name: str, tmp_path: Path) -> None:
    path = GOLDEN / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no recorded case at {path}; set LCL_SHARED_GOLDEN to the folder that holds them")
    case = ReferenceCase.load(path)
    config, recorded = case.config(), case.group("weight")
    heads = Heads(
        vision=config.vision.num_attention_heads,
        pool=config.pool.num_attention_heads,
        language=config.language.num_attention_heads,
    )
    weights = read_official(_training_file(tmp_path / "in.pt", recorded), heads)
    assert weights.config.vision == config.vision
    assert weights.config.pool == config.pool
    assert dataclasses.replace(weights.config.language, make_vocab_size_divisible_by=1) == config.language
    write_official(weights, tmp_path / "out.pt")
    _same(read_official_state(tmp_path / "out.pt"), recorded)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_survives(precision: Any, released: dict[str, Tensor], tmp_path: Path) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    half = {name: tensor.to(dtype) for name, tensor in released.items()}
    weights = read_official(_training_file(tmp_path / "in.pt", half), HEADS)
    assert {tensor.dtype for tensor in weights.state.values()} == {torch.float32}
    write_official(weights, tmp_path / "out.pt", precision)
    _same(torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"], half)
    # Within float32, and beyond what either rounds to.
    weights.state["pool.query"][3] = {"fp16": 7e4, "bf16": 3.4e38}[precision]
    with pytest.raises(CheckpointError, match=rf"query_token has values that {precision} cannot hold; write it as fp"):
        write_official(weights, tmp_path / "large.pt", precision)
    assert not (tmp_path / "large.pt").exists()


def test_open_clip_computes_our_features_with_layer_scale_and_without(tmp_path: Path) -> None:
    stock_models.library("open_clip")
    for scale in (None, 0.1):
        vision = {"layer_scale_init": scale, "hidden_size": 32, "ffn_hidden_size": 96}
        language = {"activation": "gelu", "tie_embeddings": False, "context_bias": False}
        weights = random_weights(tiny_config(vision, language))
        path = tmp_path / f"{scale}.pt"
        write_official(weights, path)
        assert ("visual.transformer.resblocks.1.ls_2.gamma" in read_official_state(path)) == (scale is not None)
        measurements = measure_released_file(path, weights, "fp32")
        assert measurements["written"].max_abs_difference == measurements["round_trip"].max_abs_difference == 0.0
        assert 0.0 < measurements["open_clip"].max_abs_difference < 1e-5
        read = read_source(str(path), Heads(vision=2, pool=4, language=2))
        for name, tensor in weights.state.items():
            rows = 300 if tensor.shape[0] == 384 else None
            assert torch.equal(read.weights.state[name][:rows], tensor[:rows]), name
        name = "vision.final_layernorm.bias"
        read.weights.state[name] = read.weights.state[name] + 0.1
        assert not read.measurements()["open_clip"].passed
        assert read.measurements()["round_trip"].max_abs_difference == pytest.approx(0.1, rel=1e-5)


def _gelu(**language: Any) -> ModelWeights:
    return random_weights(tiny_config({}, {"activation": "gelu", **language}))


def test_tied_embeddings_become_two_matrices_and_a_zero_bias_is_left_out(tmp_path: Path) -> None:
    weights = _gelu()
    weights.state["language.heads.context_projection.bias"].zero_()
    write_official(weights, tmp_path / "out.pt")
    back = read_official(tmp_path / "out.pt", Heads(vision=2, pool=4, language=2))
    assert not back.config.language.tie_embeddings
    embedding = weights.state["language.embedding.word_embeddings.weight"][:300]
    for name in ("language.embedding.word_embeddings.weight", "language.output_projection.weight"):
        assert torch.equal(back.state[name][:300], embedding)


def test_models_that_the_released_code_cannot_run_are_refused_with_every_reason(tmp_path: Path) -> None:
    vision = {"class_token": False, "activation": "quick_gelu", "layernorm_epsilon": 1e-6}
    with pytest.raises(CheckpointError) as caught:
        official_state(random_weights(tiny_config(vision, {"layernorm_epsilon": 1e-6})))
    assert str(caught.value).splitlines()[:-1] == [
        "the released code cannot run this model:",
        "  language.activation = relu; it has erf-GELU",
        "  vision.activation = quick_gelu; it has erf-GELU",
        "  vision.class_token = false; it has a class token",
        "  language.context_bias = true; it has no bias there, and this one is not zero",
        "  vision.layernorm_epsilon = 1e-06; it has 1e-05",
        "  language.layernorm_epsilon = 1e-06; it has 1e-05",
    ]
    assert "the presets official_*" in str(caught.value)
    with pytest.raises(CheckpointError, match="the weights hold vision only, and not pool, language, logit_scale"):
        official_state(only_parts(_gelu(), ["vision"]))
    (tmp_path / "there.pt").touch()
    with pytest.raises(CheckpointError, match=r"there\.pt exists; weights are never written over others"):
        write_official(_gelu(context_bias=False), tmp_path / "there.pt")


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_nothing_but_tensors_is_unpickled(released: dict[str, Tensor], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": released, "args": _Harmful()}, "bad.pt")
    with pytest.raises(
        CheckpointError,
        match=r"bad\.pt cannot be read: it holds other things than tensors \(\w+\.mkdir\), which are not unp",
    ):
        read_official_state("bad.pt")
    Path("plain.pt").write_bytes(pickle.dumps(_Harmful(), protocol=2))
    with pytest.raises(CheckpointError):
        read_official_state("plain.pt")
    assert not Path("harmed").exists()


def test_files_of_other_things_are_refused(released: dict[str, Tensor], tmp_path: Path) -> None:
    def refusal(content: Any, heads: Heads = HEADS) -> str:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(CheckpointError) as caught:
            read_official(tmp_path / "x.pt", heads)
        return str(caught.value)

    for content in ([1, 2], {}, {"state_dict": {"a": 3}}, {"state_dict": torch.zeros(2)}):
        assert "x.pt holds no state dict; expected tensors by name" in refusal(content)
    assert refusal(released | {"visual.proj": torch.zeros(3)}).endswith(
        "absent nothing, unknown visual.proj; compare depth, class token and LayerScale with the configuration"
    )
    message = refusal({name: tensor for name, tensor in released.items() if not name.startswith("text.")})
    assert "x.pt has no text.token_embedding.weight: it is no model of the released LCL code; an open_clip" in message
    message = refusal(released | {"visual.positional_embedding": torch.zeros(25, 40)})
    assert "visual.positional_embedding has 25 rows; expected one for the class token and a square number" in message
    assert "the width 40 is no multiple of 64, so it is not one head for every 64" in refusal(released, Heads())
    assert "give their number: --heads.pool" in refusal(released, Heads(vision=5))
    assert "--heads.language 5 does not divide the width 36" in refusal(released, Heads(vision=5, pool=6, language=5))
    (tmp_path / "x.pt").write_bytes(b"PK\3\4 not a file of torch")
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read as a file of torch\.save or safetensors: "):
        read_official_state(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"absent\.safetensors cannot be read"):
        read_official_state(tmp_path / "absent.safetensors")
