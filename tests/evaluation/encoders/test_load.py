"""Encoders of stock libraries.

Oracles: the same model loaded and called by its own library, on its own library's preprocessing of the same image.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcl_megatron.checkpoint.stock_libraries import LibraryError
from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.encoders.encoder import EncoderError, ImageEncoder, add_drop_path
from lcl_megatron.evaluation.encoders.load import encoder_name, load_encoder
from lcl_megatron.evaluation.flags import TransferFlags
from tests.evaluation.encoders.test_preprocessing import picture, png
from tests.stock import stock_or_skip

IMAGE = picture(50, 40)
ARCHITECTURE = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
SMALL_SPEC = f"{ARCHITECTURE}?img_size=32,patch_size=8,depth=2,embed_dim=32,num_heads=2"


def features_of(encoder: ImageEncoder) -> Tensor:
    with torch.no_grad():
        return encoder(encoder.preprocessing(png(IMAGE))[None])


def make_timm(**arguments: Any) -> Any:
    timm = stock_or_skip("timm")
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, **SMALL, **arguments).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def write_timm_folder(folder: Path, model: Any, **arguments: Any) -> Path:
    """Write a model as timm_wrapper folder, as an export does."""
    safetensors = pytest.importorskip("safetensors.torch")
    folder.mkdir()
    pretrained = {
        "architecture": ARCHITECTURE,
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "num_classes": 0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config = {
        "model_type": "timm_wrapper",
        "architecture": ARCHITECTURE,
        "num_classes": 0,
        "model_args": SMALL | arguments,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("arguments", [{}, {"class_token": False, "global_pool": "avg", "fc_norm": False}])
def test_exported_folder_equals_timm(tmp_path: Path, arguments: dict[str, Any]) -> None:
    timm = stock_or_skip("timm")
    folder = write_timm_folder(tmp_path / "export", make_timm(**arguments), **arguments)
    encoder = load_encoder(str(folder))
    assert (encoder.name, encoder.image_size, encoder.width, encoder.num_patches) == ("export", 32, 32, 16)

    own = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(own))
    with torch.no_grad():
        expected = own.forward_features(transform(IMAGE)[None])
    expected = expected[:, 0 if arguments else 1 :]
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(features_of(encoder), expected, rtol=1e-5, atol=1e-5)


def test_untrained_twin_of_a_folder_has_its_shapes_and_transform_and_other_weights(tmp_path: Path) -> None:
    folder = write_timm_folder(tmp_path / "export", make_timm())
    trained, first, again, other = (
        load_encoder(spec, seed=seed)
        for spec, seed in (
            (str(folder), 0),
            (f"random:{folder}", 0),
            (f"twin=random:{folder}", 0),
            (f"random:{folder}", 1),
        )
    )
    states = [encoder.model.state_dict() for encoder in (trained, first, again, other)]
    assert [{name: tensor.shape for name, tensor in state.items()} for state in states[1:]] == [
        {name: tensor.shape for name, tensor in states[0].items()}
    ] * 3
    assert first.preprocessing == trained.preprocessing
    assert (first.name, again.name) == (f"random:{folder}", "twin")
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(states[1][name], states[2][name])
    assert not torch.equal(states[1][name], states[0][name])
    assert not torch.equal(states[1][name], states[3][name])
    # Arguments go on top of the folder's own.
    assert load_encoder(f"random:{folder}?depth=1").num_patches == 16


def test_untrained_twin_needs_a_folder_of_timm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip_vision_model"}')
    with pytest.raises(
        EncoderError, match="random: takes the architecture of a timm_wrapper folder: give the folder that"
    ):
        load_encoder(f"random:{tmp_path}")


def test_norm_behind_the_pool_is_applied_to_tokens() -> None:
    timm = stock_or_skip("timm")
    spec = f"random:{SMALL_SPEC},global_pool='avg',fc_norm=true"
    encoder = load_encoder(spec)
    model: Any = encoder.model
    assert isinstance(model.norm, nn.Identity)
    with torch.no_grad():
        model.fc_norm.weight.fill_(3.0)
        pixels = encoder.preprocessing(png(IMAGE))[None]
        tokens = model.forward_features(encoder.preprocessing.normalize(pixels))
        expected = nn.functional.layer_norm(tokens, (32,), model.fc_norm.weight, model.fc_norm.bias, model.fc_norm.eps)
    torch.testing.assert_close(features_of(encoder), expected[:, 1:], rtol=1e-5, atol=1e-5)
    assert timm is not None


def test_open_clip_folder_and_file_equal_open_clip(tmp_path: Path) -> None:
    open_clip = stock_or_skip("open_clip")
    safetensors = pytest.importorskip("safetensors.torch")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 1, "layers": 1},
    }
    model = open_clip.CLIP(**config).eval()
    for parameter in model.visual.parameters():
        nn.init.normal_(parameter, std=0.2)
    preprocess = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    folder = tmp_path / "oc"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    safetensors.save_file(model.state_dict(), folder / "open_clip_model.safetensors")

    own, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    own.eval().visual.output_tokens = True
    with torch.no_grad():
        expected = own.visual(transform(IMAGE)[None])[1]
    encoder = load_encoder(str(folder))
    assert expected.shape == (1, encoder.num_patches, encoder.width) == (1, 16, 64)
    torch.testing.assert_close(features_of(encoder), expected, rtol=1e-5, atol=1e-5)


def clip_folder(tmp_path: Path, crop: int = 32) -> Path:
    transformers = stock_or_skip("transformers")
    folder = tmp_path / "clip_vision"
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = transformers.CLIPVisionModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    kind(size={"shortest_edge": 37}, crop_size={"height": 32, "width": crop}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefix", ["", "clip:"])
def test_clip_folder_equals_transformers(tmp_path: Path, prefix: str) -> None:
    transformers = stock_or_skip("transformers")
    folder = clip_folder(tmp_path)
    own = transformers.CLIPVisionModel.from_pretrained(folder).eval()
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    pixels = torch.as_tensor(kind.from_pretrained(folder)(IMAGE, return_tensors="pt").pixel_values)
    with torch.no_grad():
        states = own(pixel_values=pixels).last_hidden_state
        expected = getattr(own, "vision_model", own).post_layernorm(states)[:, 1:]
    encoder = load_encoder(f"{prefix}{folder}")
    torch.testing.assert_close(features_of(encoder), expected, rtol=1e-5, atol=1e-5)


def test_random_weights_depend_on_the_seed_alone_and_leave_torch_s_state() -> None:
    stock_or_skip("timm")
    spec = f"random:{SMALL_SPEC}"
    torch.manual_seed(5)
    first = load_encoder(spec).fingerprint()
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert load_encoder(spec).fingerprint() == first
    assert load_encoder(spec, seed=1).fingerprint() != first


def test_fingerprint_follows_weights_and_preprocessing() -> None:
    stock_or_skip("timm")
    encoder = load_encoder(f"mine=random:{SMALL_SPEC}")
    assert encoder.name == encoder.describe()["name"] == "mine"
    before = encoder.fingerprint()
    encoder.preprocessing = dataclasses.replace(encoder.preprocessing, resize=40)
    changed = encoder.fingerprint()
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] += 1e-3
    assert len({before, changed, encoder.fingerprint()}) == 3


def test_fingerprint_follows_what_is_computed_from_the_same_weights() -> None:
    """Features of one would otherwise be taken from the cache of the other; drop-path changes nothing there."""
    stock_or_skip("timm")
    spec = f"random:{SMALL_SPEC}"
    variants = [f"{spec},act_layer='quick_gelu'", spec.replace("num_heads=2", "num_heads=4")]
    plain = load_encoder(spec)
    for variant in variants:
        changed = load_encoder(variant)
        for name, tensor in plain.model.state_dict().items():
            assert torch.equal(changed.model.state_dict()[name], tensor)
        assert not torch.equal(features_of(changed), features_of(plain))
        assert changed.fingerprint() != plain.fingerprint()
    assert load_encoder(spec, drop_path_rate=0.5).fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("kind", ["timm", "clip"])
def test_drop_path_acts_in_training_only_and_keeps_the_mean(tmp_path: Path, kind: str) -> None:
    stock_or_skip("timm")
    stock_or_skip("transformers")
    spec = f"random:{SMALL_SPEC}" if kind == "timm" else str(clip_folder(tmp_path))
    plain, dropping = load_encoder(spec), load_encoder(spec, drop_path_rate=0.5)
    assert torch.equal(features_of(plain), features_of(dropping))
    dropping.train()
    torch.manual_seed(0)
    assert not torch.equal(features_of(plain), features_of(dropping))


def test_added_drop_path_multiplies_by_zero_or_the_inverse_of_what_is_kept() -> None:
    layers = nn.ModuleList(nn.Identity() for _ in range(3))
    add_drop_path([[layer] for layer in layers], 0.5)
    ones = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    assert torch.equal(layers[0](ones), ones)
    for layer, probability in ((layers[1], 0.25), (layers[2], 0.5)):
        dropped = layer(ones)
        kept = dropped[:, 0, 0] != 0
        assert torch.equal(dropped, kept[:, None, None] * ones / (1 - probability))
        # Four standard deviations of a share of 4,000 draws.
        assert abs(float(kept.float().mean()) - (1 - probability)) < 4 * (probability * (1 - probability) / 4000) ** 0.5
    layers.eval()
    assert torch.equal(layers[2](ones), ones)


def test_gradients_reach_the_encoder() -> None:
    stock_or_skip("timm")
    encoder = load_encoder(f"random:{SMALL_SPEC}")
    encoder(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "there is no such folder; expected an exported folder, timm:NAME"),
        ("timm:", "names nothing behind the colon"),
        ("jax:vit", "unknown kind 'jax'; expected an exported folder"),
        ("random:resnet10t", r"ResNet returns features of shape \(1, 512, 6, 6\), not patch tokens"),
        ("random:no_such_model", r"cannot be loaded: RuntimeError: Unknown model \(no_such_model\)"),
        (f"random:{ARCHITECTURE}?depth", "'depth' are no arguments"),
        (f"random:{ARCHITECTURE}?zork=1", "unexpected keyword argument 'zork'"),
        ("open_clip:ViT-B-32", "expected open_clip:MODEL/PRETRAINED"),
        ("open_clip:ViT-B-32/zork", "'zork' is neither a file nor weights of ViT-B-32 in open_clip; known: openai,"),
    ],
)
def test_what_cannot_be_loaded_is_explained(spec: str, message: str) -> None:
    for library in ("timm", "open_clip"):
        stock_or_skip(library)
    with pytest.raises(EncoderError, match=message):
        load_encoder(spec)


def test_absent_library_is_not_taken_for_a_wrong_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "timm_wrapper"}')
    monkeypatch.setitem(sys.modules, "timm", None)
    for spec in (str(tmp_path), f"random:{ARCHITECTURE}"):
        with pytest.raises(LibraryError, match=r"^timm cannot be imported .*pip install 'lcl_megatron\[eval\]'"):
            load_encoder(spec)


def test_bad_folders_are_explained(tmp_path: Path) -> None:
    with pytest.raises(
        EncoderError, match=r"config.json is missing; give an exported folder \(a training checkpoint becomes"
    ):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(EncoderError, match="is no JSON object"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(EncoderError, match="has model_type 'bert'; expected timm_wrapper, clip or clip_vision_model"):
        load_encoder(str(tmp_path))


def test_unsupported_transforms_and_lost_weights_are_explained(tmp_path: Path) -> None:
    stock_or_skip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    folder = write_timm_folder(tmp_path / "export", make_timm())
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["crop_mode"] = "border"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EncoderError, match="crop_mode 'border' is not supported"):
        load_encoder(str(folder))

    with pytest.raises(EncoderError, match=r"crop_size .* are not supported"):
        load_encoder(str(clip_folder(tmp_path, crop=30)))
    weights = tmp_path / "clip_vision" / "model.safetensors"
    tensors = {name: tensor for name, tensor in safetensors.load_file(weights).items() if "post_layernorm" not in name}
    safetensors.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"2 weights are missing, e\.g\. .*post_layernorm.bias"):
        load_encoder(str(tmp_path / "clip_vision"))


def test_encoders_that_are_called_alike_are_refused(tmp_path: Path) -> None:
    """Else the second's model and predictions would replace the first's."""
    folders = [tmp_path / run / "clip_vision" for run in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    specs = tuple(map(str, folders))
    with pytest.raises(ConfigError, match="two are called alike, clip_vision, .*name them: NAME=ENCODER"):
        TransferFlags(encoder=specs, output=tmp_path)
    assert TransferFlags(encoder=(specs[0], f"other={specs[1]}", "timm:x?a=1"), output=tmp_path).encoder[0] == specs[0]
    spec = f"random:{SMALL_SPEC}"
    stock_or_skip("timm")
    for named in (spec, f"mine={spec}"):
        assert load_encoder(named).name == encoder_name(named)
