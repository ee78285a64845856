"""Vision towers of transformers, open_clip and timm as ours. Oracle: those libraries, on random weights: their features
on the same images, and their own state dicts, which must come back bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcl_megatron.checkpoint.convert.importing import read_source, tower_source
from lcl_megatron.checkpoint.convert.measurement import Measurement, largest_difference
from lcl_megatron.checkpoint.convert.parity import tower_features
from lcl_megatron.checkpoint.convert.stock_timm import timm_tower
from lcl_megatron.checkpoint.convert.stock_tower import layernorm_epsilon
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.config import RunConfig, VisionConfig
from tests.checkpoint.convert import stock_models
from tests.checkpoint.convert.stock_models import SIZE

TOLERANCE = 1e-5
"""Of features of size 1 after two layers in float32; seen: at most 2e-6."""
Features = Callable[[Tensor], Tensor]
Built = tuple[str, Features]
"""A source, and what its library computes."""


def _clip_features(model: Any) -> Features:
    tower = getattr(model, "vision_model", model)
    return lambda pixels: tower.post_layernorm(tower(pixel_values=pixels).last_hidden_state)[:, 1:]


def _clip_vision(folder: Path) -> Built:
    model = stock_models.clip_vision_model(hidden_act="gelu")
    model.save_pretrained(folder)
    return f"clip:{folder}", _clip_features(model)


def _openai_clip(folder: Path) -> Built:
    model = stock_models.clip_model(layer_norm_eps=1e-5)
    model.save_pretrained(folder)
    assert model.config.vision_config.hidden_act == "quick_gelu"
    return str(folder), _clip_features(model)


def _open_clip_features(visual: Any) -> Features:
    # As in the library's forward pass with output_tokens: behind the last LayerNorm, without the class token.
    visual.output_tokens = True
    return lambda pixels: visual(pixels)[1]


def _open_clip(folder: Path) -> Built:
    return f"open_clip:local-dir:{folder}", _open_clip_features(stock_models.open_clip_folder(folder).visual)


def _open_clip_scaled(folder: Path) -> Built:
    model = stock_models.open_clip_folder(folder, quick_gelu=True, ls_init_value=0.1, mlp_ratio=3.0)
    return str(folder), _open_clip_features(model.visual)


def _timm_features(model: Any) -> Features:
    return lambda pixels: model.forward_features(pixels)[:, model.num_prefix_tokens :]


def _timm(folder: Path) -> Built:
    return f"timm:local-dir:{folder}", _timm_features(stock_models.timm_folder(folder))


def _timm_variant(folder: Path) -> Built:
    model = stock_models.timm_folder(
        folder,
        "vit_base_patch16_clip_quickgelu_224",
        class_token=False,
        global_pool="map",
        init_values=0.1,
        mlp_ratio=2.5,
        drop_path_rate=0.3,
    )
    return str(folder), _timm_features(model)


BUILDERS: dict[str, tuple[Callable[[Path], Built], VisionConfig]] = {
    name: (
        build,
        VisionConfig(
            image_size=SIZE,
            patch_size=stock_models.PATCH,
            num_layers=stock_models.LAYERS,
            hidden_size=stock_models.WIDTH,
            num_attention_heads=stock_models.HEADS,
            drop_path_rate=0.0,
            **{"ffn_hidden_size": stock_models.FFN, "layer_scale_init": None, **different},
        ),
    )
    for name, build, different in (
        ("CLIPVisionModel", _clip_vision, {"layernorm_epsilon": 2e-5}),
        ("CLIPModel of OpenAI's recipe", _openai_clip, {"activation": "quick_gelu"}),
        ("open_clip", _open_clip, {}),
        (
            "open_clip with LayerScale and QuickGELU",
            _open_clip_scaled,
            {"activation": "quick_gelu", "layer_scale_init": 0.1, "ffn_hidden_size": 96},
        ),
        ("timm", _timm, {}),
        (
            "timm without class token, with LayerScale and QuickGELU",
            _timm_variant,
            {"class_token": False, "activation": "quick_gelu", "layer_scale_init": 0.1, "ffn_hidden_size": 80},
        ),
    )
}


@pytest.fixture(params=BUILDERS)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Features, VisionConfig]:
    build, vision = BUILDERS[request.param]
    source, features = build(tmp_path / "source")
    return source, features, vision


def test_tower_computes_what_the_library_computes(built: tuple[str, Features, VisionConfig]) -> None:
    source, features, vision = built
    weights = read_source(source).weights
    assert weights.config == RunConfig(vision=vision)
    assert weights.parts == ("vision",)
    images = stock_models.images()
    with torch.no_grad():
        expected = features(images)
    found = tower_features(weights, images)
    assert found.shape == expected.shape == (3, vision.num_patches, vision.hidden_size)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


def test_weights_come_back_bit_by_bit_and_a_change_is_measured(
    built: tuple[str, Features, VisionConfig],
) -> None:
    read = read_source(built[0])
    back = read.back(read.weights)
    assert back.keys() == read.original.keys()
    for name, tensor in read.original.items():
        assert torch.equal(back[name], tensor), name
    measurements = read.measurements()
    assert all(one.passed for one in measurements.values())
    assert measurements.pop("round_trip") == Measurement("", 0.0, 0.0, tolerance=0.0)
    ((library, one),) = measurements.items()
    assert library == built[0].partition(":")[0] or library in ("clip", "open_clip", "timm")
    assert one.loaded_as == library
    assert 0.0 < one.max_abs_difference < TOLERANCE
    # The first value of the first head: a tensor of its own, where others may share memory with the source's.
    head_width = stock_models.WIDTH // stock_models.HEADS
    read.weights.state["vision.layers.1.self_attention.linear_qkv.bias"][2 * head_width] += 0.1
    changed = read.measurements()
    assert changed["round_trip"].max_abs_difference == pytest.approx(0.1, rel=1e-5)
    assert changed[library].max_abs_difference > 100 * TOLERANCE
    assert not any(one.passed for one in changed.values())


def test_nan_is_no_small_difference() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(2)}
    for name in expected:
        found = expected | {name: torch.tensor([0.0, float("nan")])}
        assert largest_difference(found, expected) == float("inf")
        assert not Measurement.of_weights(found, expected).passed
        assert not Measurement.of_outputs("x", found[name], expected[name]).passed
        assert not Measurement.of_outputs("x", expected[name], found[name]).passed
    assert not Measurement.of_outputs("x", torch.zeros(2), torch.zeros(3)).passed


def _refusal(source: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_source(source)
    return str(caught.value)


def test_plain_vit_of_timm_is_refused_with_every_reason(tmp_path: Path) -> None:
    stock_models.timm_folder(tmp_path / "vit", "vit_base_patch16_224", no_embed_class=True)
    message = _refusal(f"timm:local-dir:{tmp_path / 'vit'}")
    assert message.startswith(f"timm:local-dir:{tmp_path / 'vit'}: our vision tower cannot hold it exactly:\n")
    for reason in ("norm_pre", "patch_embed.proj.bias", "no_embed_class"):
        assert f"({reason})" in message
    assert "What fits: CLIP's towers, such as timm's vit_*_clip_*" in message
    assert "reg_token" not in message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reg_tokens": 2}, "register tokens (reg_token)"),
        ({"global_pool": "avg", "fc_norm": True}, "no LayerNorm after the last layer (norm)"),
        ({"pos_embed": "none"}, "no learned positions (pos_embed)"),
        ({"img_size": [24, 32]}, "images or patches that are not square"),
        ({"qk_norm": True}, "unknown blocks.0.attn.k_norm.bias, "),
        ({"qkv_bias": False}, "absent blocks.0.attn.qkv.bias, "),
        ({"act_layer": "gelu_tanh"}, "the tower's activation is GELUTanh(); ours are erf-GELU (gelu) and x * sigmoid"),
        ({"block_fn": "parallel"}, "layers of type ParallelScalingBlock"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_timm_towers_that_compute_something_else_are_refused(changes: dict[str, Any], reason: str) -> None:
    timm = stock_models.library("timm")
    if "block_fn" in changes:
        changes = {"block_fn": timm.models.vision_transformer.ParallelScalingBlock}
    model = timm.create_model("vit_base_patch16_clip_224", **stock_models.timm_arguments(**changes))
    with pytest.raises(CheckpointError) as caught:
        tower_source(timm_tower(model, "timm:x"), "timm:x")
    assert reason in str(caught.value)


def test_timm_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    timm = stock_models.library("timm")
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=32)
    with pytest.raises(CheckpointError, match="a bias on the patch projection"):
        timm_tower(model, "timm:hybrid")
    with pytest.raises(CheckpointError, match="timm:conv is a ResNet; only timm's VisionTransformer has our layers"):
        timm_tower(timm.create_model("resnet10t"), "timm:conv")
    assert "cannot be loaded" in _refusal("timm:no_such_model")
    assert "timm:local-dir:FOLDER" in _refusal(f"timm:local-dir:{tmp_path / 'absent'}")


def test_weights_that_a_library_runs_with_another_activation_than_their_own_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenAI's weights in the models of the common names, a trap of both libraries."""
    timm, open_clip = (stock_models.library(name) for name in ("timm", "open_clip"))
    sizes = stock_models.timm_arguments()
    with pytest.raises(CheckpointError, match=r"timm:x: its weights were trained with QuickGELU, and this model of ti"):
        timm_tower(timm.create_model("vit_base_patch16_clip_224.openai", **sizes), "timm:x")
    timm_tower(timm.create_model("vit_base_patch16_clip_quickgelu_224.openai", **sizes), "timm:x")
    (tmp_path / "weights.pt").touch()
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.pt"))
    assert "cannot be loaded: QuickGELU mismatch" in _refusal("open_clip:ViT-B-32/openai")


def test_layernorms_of_different_epsilon_are_refused() -> None:
    tower = torch.nn.Sequential(torch.nn.LayerNorm(2, eps=1e-5), torch.nn.LayerNorm(2, eps=1e-6))
    with pytest.raises(CheckpointError, match=r"LayerNorms have the epsilons \[1e-06, 1e-05\]; ours has one for all"):
        layernorm_epsilon(tower)
    with pytest.raises(CheckpointError, match="have the epsilons none"):
        layernorm_epsilon(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("vision", "reason"),
    [
        ({"layers": [1, 1, 1, 1], "head_width": 8}, "has a ModifiedResNet; only open_clip's VisionTransformer has our"),
        ({"no_ln_pre": True}, "no LayerNorm before the first layer (ln_pre)"),
        ({"attentional_pool": True, "attn_pooler_heads": 4}, "an attention pool before its last LayerNorm (attn_pool)"),
        ({"qk_norm": True, "block_type": "custom"}, "layers of type CustomResidualAttentionBlock"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_open_clip_towers_that_compute_something_else_are_refused(
    vision: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    stock_models.open_clip_folder(tmp_path / "model", **vision)
    assert reason in _refusal(str(tmp_path / "model"))


def test_open_clip_model_without_weights_is_refused() -> None:
    stock_models.library("open_clip")
    message = _refusal("open_clip:ViT-S-32-alt")
    assert message.startswith("open_clip:ViT-S-32-alt cannot be loaded: ")
    assert "give MODEL/PRETRAINED of open_clip.list_pretrained()" in message
    assert "cannot be loaded" in _refusal("open_clip:ViT-S-32-alt/no_such_tag")


def test_open_clip_reads_a_built_in_model_with_a_file_and_timm_inside(tmp_path: Path) -> None:
    open_clip = stock_models.library("open_clip")
    timm_model = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
    config = stock_models.open_clip_config() | {"vision_cfg": timm_model | {"image_size": 32}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = open_clip.CLIP(**config)
    save_file(model.state_dict(), tmp_path / "model" / "open_clip_model.safetensors")
    assert "(norm_pre)" in _refusal(f"open_clip:local-dir:{tmp_path / 'model'}")

    open_clip.add_model_config(_config_file(tmp_path, "tiny-lcl-test", stock_models.open_clip_config()))
    model = stock_models.randomize(open_clip.create_model("tiny-lcl-test"))
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "weights.pt")
    read = read_source(f"open_clip:tiny-lcl-test/{tmp_path / 'weights.pt'}")
    assert torch.equal(read.original["conv1.weight"], model.visual.conv1.weight)


def _config_file(folder: Path, name: str, config: dict[str, Any]) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def test_clip_models_that_lack_weights_or_compute_something_else_are_refused(tmp_path: Path) -> None:
    stock_models.clip_vision_model(hidden_act="gelu_new").save_pretrained(tmp_path / "tanh")
    assert "the tower's activation is NewGELUActivation()" in _refusal(str(tmp_path / "tanh"))
    stock_models.clip_vision_model().save_pretrained(tmp_path / "lacking")
    file = tmp_path / "lacking" / "model.safetensors"
    tensors = load_file(file)
    # Version 4 of the library writes "vision_model." before every name.
    del tensors[next(name for name in tensors if name.endswith("encoder.layers.1.mlp.fc1.bias"))]
    save_file(tensors, file, metadata={"format": "pt"})
    message = _refusal(f"clip:{tmp_path / 'lacking'}")
    assert "lacks 1 weights of CLIP's vision tower" in message
    assert "fc1.bias; it is no CLIP model" in message
    assert "give a folder or a hub name of a CLIPModel" in _refusal(f"clip:{tmp_path / 'absent'}")


def test_unknown_sources_are_refused(tmp_path: Path) -> None:
    message = f"{tmp_path / 'absent.pt'}: there is no such file or folder, and it does not begin with clip:, open_clip:"
    assert message in _refusal(str(tmp_path / "absent.pt"))
    assert "is neither a folder of weights" in _refusal(str(tmp_path))
