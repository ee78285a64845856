"""Tiny models of transformers, open_clip and timm with every parameter random, and folders as the libraries save them.

A wrong map cannot pass: no two tensors agree, no bias is zero and no LayerNorm is the identity.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library

SIZE, PATCH, WIDTH, LAYERS, HEADS, FFN = 24, 8, 32, 2, 4, 128
MEAN_AND_STD = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def library(name: str) -> Any:
    """Return a stock library, or skip the test where it is not installed."""
    try:
        return stock_library(name)
    except LibraryError as error:
        pytest.skip(str(error))


def randomize(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and name.endswith(("weight", "gamma")):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() >= 2 and "embed" not in name and "token" not in name:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.25 * noise)
    return module.eval()


def images(size: int = SIZE) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(9))


def clip_vision_config(**changes: Any) -> Any:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIZE,
        "patch_size": PATCH,
        "layer_norm_eps": 2e-5,
    }
    return library("transformers").CLIPVisionConfig(**sizes | changes)


def clip_vision_model(**changes: Any) -> Any:
    return randomize(library("transformers").CLIPVisionModel(clip_vision_config(**changes)))


def clip_model(**changes: Any) -> Any:
    transformers = library("transformers")
    text = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=clip_vision_config(**changes).to_dict(), projection_dim=12
    )
    return randomize(transformers.CLIPModel(config))


def open_clip_config(**vision: Any) -> dict[str, Any]:
    sizes = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": LAYERS, "head_width": WIDTH // HEADS}
    return {
        "embed_dim": 20,
        "vision_cfg": sizes | vision,
        "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
    }


def open_clip_folder(folder: Path, quick_gelu: bool = False, **vision: Any) -> Any:
    """Write a folder that ``open_clip.create_model("local-dir:...")`` reads; return the model."""
    open_clip = library("open_clip")
    config = open_clip_config(**vision) | {"quick_gelu": quick_gelu}
    model = randomize(open_clip.CLIP(**config))
    folder.mkdir()
    described = {"model_cfg": config, "preprocess_cfg": MEAN_AND_STD}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def timm_arguments(**changes: Any) -> dict[str, Any]:
    sizes = {
        "img_size": SIZE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": LAYERS,
        "num_heads": HEADS,
        "num_classes": 5,
    }
    return sizes | changes


def timm_folder(folder: Path, architecture: str = "vit_base_patch16_clip_224", **changes: Any) -> Any:
    """Write a folder that ``timm.create_model("local-dir:...")`` reads; return the model."""
    arguments = timm_arguments(**changes)
    model = randomize(library("timm").create_model(architecture, **arguments))
    folder.mkdir()
    num_classes = arguments.pop("num_classes")
    described = {
        "architecture": architecture,
        "num_classes": num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, arguments["img_size"], arguments["img_size"]],
            "num_classes": num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **MEAN_AND_STD,
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model
