"""Exports loaded by the stock libraries. Oracle: the model's own forward pass on the same random inputs, in float32.

No parameter is 0 or 1, so that a wrong map shows; that it does is tested too.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lcl_megatron.checkpoint.convert.export_targets import ExportSource
from lcl_megatron.checkpoint.convert.measurement import Measurement
from lcl_megatron.checkpoint.convert.timm_vit import architecture_of, to_timm
from lcl_megatron.checkpoint.export import ExportReport, export_weights
from lcl_megatron.checkpoint.export_check import measure, reference
from lcl_megatron.checkpoint.parameters import parameter_shapes
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.data.tokenizer import Tokenizer
from tests.checkpoint.random_weights import random_weights, tiny_config

PLAIN = {"layer_scale_init": None}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "class token, LayerScale; relu, tied": ({}, {}),
    "no class token; gelu, untied": (
        {"class_token": False},
        {"activation": "gelu", "tie_embeddings": False, "context_bias": False},
    ),
    "no LayerScale; gelu, tied": (PLAIN, {"activation": "gelu"}),
    "no class token, no LayerScale; relu, untied, no padding": (
        {"class_token": False, **PLAIN},
        {"tie_embeddings": False, "vocab_size": 384},
    ),
    "QuickGELU": ({"activation": "quick_gelu"}, {}),
    "epsilon 1e-6": ({"layernorm_epsilon": 1e-6}, {}),
    "odd MLP width": ({"hidden_size": 24, "ffn_hidden_size": 89, "num_attention_heads": 3}, {}),
}


def export(folder: Path, vision: dict[str, Any], language: dict[str, Any], tokenizer: Tokenizer) -> Any:
    language = {"vocab_size": tokenizer.vocab_size, **language}
    weights = random_weights(tiny_config(vision, language), tokenizer=tokenizer.model)
    return weights, export_weights(weights, folder / "export", include_whole_model=True)


@pytest.fixture(scope="module")
def exported(
    transformers: ModuleType, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, ExportReport, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return *export(folder, {}, {}, tokenizer), folder / "export"


@pytest.mark.parametrize("name", MODELS)
def test_every_folder_computes_what_the_model_computes(
    name: str, transformers: ModuleType, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    vision, language = MODELS[name]
    weights, report = export(tmp_path, vision, language, tokenizer)
    measurements = measure(report, weights, tmp_path / "export")
    has_class_token = weights.config.vision.class_token
    expected = {"timm", "auto_model", "clip_vision", "language_model", "whole_model"}
    assert set(measurements) == expected - (set() if has_class_token else {"clip_vision"})
    for key, one in measurements.items():
        assert one.passed, (key, one)
        assert 0.5 < one.largest_output < 20, key
        assert one.max_abs_difference < 1e-5, key
    assert all(folder.round_trip in (0.0, None) for folder in report.folders.values())
    if not has_class_token:
        assert report.folders["clip_vision"].skipped == "CLIPVisionModel has a class token; vision.class_token = False"
        assert not (tmp_path / "export" / "clip_vision").exists()


def test_figures_name_the_classes_that_were_built(exported: tuple[Any, ExportReport, Path]) -> None:
    weights, report, folder = exported
    measurements = measure(report, weights, folder)
    assert {name: one.loaded_as for name, one in measurements.items()} == {
        "timm": "timm.models.vision_transformer.VisionTransformer",
        "auto_model": "transformers.models.timm_wrapper.modeling_timm_wrapper.TimmWrapperModel",
        "clip_vision": "transformers.models.clip.modeling_clip.CLIPVisionModel",
        "language_model": "transformers.models.opt.modeling_opt.OPTForCausalLM",
        "whole_model": "exported_modeling_lcl.LCLForConditionalGeneration",
    }


def _swap(first: str, second: str) -> Any:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return edit


def _lose(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def _shift(name: str) -> Any:
    return lambda tensors: tensors.update({name: tensors[name].roll(1, 0)})


WHOLE = "language_model.model.decoder"


@pytest.mark.parametrize(
    ("folder", "edit", "failing"),
    [
        (".", _swap("blocks.0.norm1.weight", "blocks.0.norm2.weight"), {"timm", "auto_model"}),
        (".", _swap("blocks.0.ls1.gamma", "blocks.0.ls2.gamma"), {"timm", "auto_model"}),
        (".", _shift("blocks.1.attn.qkv.bias"), {"timm", "auto_model"}),
        ("clip_vision", _shift("vision_model.embeddings.position_embedding.weight"), {"clip_vision"}),
        ("clip_vision", _lose("vision_model.post_layernorm.bias"), {"clip_vision"}),
        ("language_model", _shift("model.decoder.embed_positions.weight"), {"language_model"}),
        ("language_model", _lose("model.decoder.layers.1.fc1.bias"), {"language_model"}),
        ("lcl", _shift("pool.query"), {"whole_model"}),
        ("lcl", _swap("context_layernorm.weight", "context_layernorm.bias"), {"whole_model"}),
        ("lcl", _shift("language_model.lm_head.weight"), {"whole_model"}),
    ],
)
def test_a_wrong_tensor_is_found(
    folder: str, edit: Any, failing: set[str], exported: tuple[Any, ExportReport, Path], tmp_path: Path
) -> None:
    weights, report, source = exported
    wrong = tmp_path / "wrong"
    for path in source.rglob("*"):
        if path.is_file():
            copy = wrong / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    file = wrong / folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    only = {name: part for name, part in report.folders.items() if part.folder == folder}
    measurements = measure(ExportReport({}, {}, only), weights, wrong)
    assert set(measurements) == failing
    assert not any(one.passed for one in measurements.values())


def test_nan_and_lost_tensors_do_not_pass() -> None:
    assert Measurement("x", 9e-6, 0.1).passed
    assert not Measurement("x", 1.1e-5, 0.1).passed
    assert Measurement("x", 9e-5, 10.0).passed
    assert not Measurement("x", float("nan"), 1.0).passed
    assert not Measurement("x", float("inf"), float("inf")).passed
    assert not Measurement("x", 0.0, float("inf")).passed
    assert not Measurement("x", 0.0, float("nan")).passed
    assert Measurement("", 0.0, 0.0, tolerance=0.0).passed
    assert not Measurement("", 1e-30, 0.0, tolerance=0.0).passed
    assert not Measurement("", float("inf"), 0.0, tolerance=0.0).passed
    assert not Measurement("x", 0.0, 1.0, missing_keys=("a",)).passed
    assert not Measurement("x", 0.0, 1.0, unexpected_keys=("a",)).passed


def test_llava_reads_the_layer_before_the_last(exported: tuple[Any, ExportReport, Path], transformers: Any) -> None:
    """LLaVA-1.5 takes ``hidden_states[-2]``: here, what our tower has after all layers but one."""
    weights, _, folder = exported
    tower = transformers.CLIPVisionModel.from_pretrained(folder / "clip_vision").eval()
    with torch.no_grad(), reference(ExportSource(weights)) as model:
        vision: Any = model.model.vision
        vision.layers._modules.pop("1")
        vision.final_layernorm = torch.nn.Identity()
        expected = model.image_tokens()
        found = tower(model.images, output_hidden_states=True).hidden_states[-2]
    assert (found - expected).abs().max() < 1e-5


def test_timm_builds_the_usual_variants(exported: tuple[Any, ExportReport, Path]) -> None:
    """What the documentation promises: heads, drop-path, other resolutions, feature maps."""
    _, _, folder = exported
    timm = stock_library("timm")
    name, pixels = f"local-dir:{folder}", torch.randn(2, 3, 16, 16)
    model = timm.create_model(name, pretrained=True, num_classes=5, drop_path_rate=0.2)
    assert model(pixels).shape == (2, 5)
    assert [block.drop_path1.drop_prob for block in model.blocks[1:]] == [pytest.approx(0.2)]
    plain = timm.create_model(name, pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        assert torch.equal(plain(pixels), plain.forward_features(pixels)[:, 1:].mean(dim=1))
    assert timm.create_model(name, pretrained=True, num_classes=5, global_pool="map")(pixels).shape == (2, 5)
    assert (
        timm.create_model(name, pretrained=True, num_classes=0, img_size=32)(torch.randn(1, 3, 32, 32)).shape[1] == 16
    )
    maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1))(pixels)
    assert [tuple(feature.shape) for feature in maps] == [(2, 16, 2, 2)] * 2


SIZES = [
    ("vit_medium_patch16_clip_224", (16, 224, 512, 12, 8, 2048)),
    ("vit_base_patch32_clip_224", (32, 224, 768, 12, 12, 3072)),
    ("vit_base_patch16_clip_224", (16, 224, 768, 12, 12, 3072)),
    ("vit_base_patch16_clip_384", (16, 384, 768, 12, 12, 3072)),
    ("vit_large_patch14_clip_224", (14, 224, 1024, 24, 16, 4096)),
    ("vit_large_patch14_clip_336", (14, 336, 1024, 24, 16, 4096)),
    ("vit_huge_patch14_clip_224", (14, 224, 1280, 32, 16, 5120)),
    ("vit_huge_patch14_clip_336", (14, 336, 1280, 32, 16, 5120)),
]


@pytest.mark.parametrize(("name", "size"), SIZES, ids=[name for name, _ in SIZES])
def test_known_sizes_name_their_timm_architecture(name: str, size: tuple[int, ...], transformers: ModuleType) -> None:
    """timm's own architecture of that name has the same parameters, heads and epsilon, with no size overridden."""
    patch, image, width, layers, heads, mlp = size
    vision = {"num_layers": layers, "hidden_size": width, "ffn_hidden_size": mlp, "num_attention_heads": heads}
    config = tiny_config({"patch_size": patch, "image_size": image, **vision})
    found, arguments = architecture_of(config.vision)
    assert found == name
    assert arguments.keys() == {"class_token", "global_pool", "fc_norm", "init_values"}
    timm = stock_library("timm")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, **arguments)
        exported = to_timm({key: torch.empty(shape) for key, shape in parameter_shapes(config).items()}, config)
    assert {key: value.shape for key, value in exported.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert model.blocks[0].attn.num_heads == heads
    assert model.norm.eps == model.norm_pre.eps == model.blocks[0].norm1.eps == 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("positions", "images", "length"), [(64, 2, 49), (24, 1, 23), (7, 1, 7), (8, 1, 7), (9, 1, 9)])
def test_documents_of_the_check_fit_the_positions(
    positions: int, images: int, length: int, tokenizer: Tokenizer
) -> None:
    """4 latents per image; the smallest row is <s> <BoI> image <EoI>."""
    config = tiny_config(language={"max_position_embeddings": positions, "vocab_size": tokenizer.vocab_size})
    with reference(ExportSource(random_weights(config, tokenizer=tokenizer.model))) as model:
        special = tokenizer.special_tokens
        batch = model.interleaved(special)
        assert batch.num_images == images
        assert batch.tokens.shape == (1, length)
        assert batch.tokens[0, batch.context_slots].tolist() == [special.boi] * images
        assert int((batch.tokens == special.image).sum()) == 4 * images
        assert torch.isfinite(model.logits(batch)).all()


def test_nan_in_one_of_several_outputs_is_found(transformers: ModuleType, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The projection of the text reaches its features only, which are not the first outputs that are compared."""
    weights = random_weights(tiny_config({}, {"vocab_size": tokenizer.vocab_size}), tokenizer=tokenizer.model)
    report = export_weights(weights, tmp_path / "export", include_whole_model=True)
    file = tmp_path / "export" / "lcl" / "model.safetensors"
    tensors = load_file(file)
    tensors["context_projection.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    only = {"whole_model": report.folders["whole_model"]}
    (measurement,) = measure(ExportReport({}, {}, only), weights, tmp_path / "export").values()
    assert not measurement.passed
