"""Images that can be told apart by their colour, with captions and conversations, and a language model for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lcl_megatron.checkpoint.stock_libraries import stock_library
from tests.evaluation.vision_language import tiny_models

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
ENCODER = "tiny=random:vit_tiny_patch16_224?img_size=16,patch_size=8,embed_dim=16,depth=1,num_heads=2"
"""An untrained encoder: the colour of a picture survives it."""


def write_images(folder: Path, count: int) -> list[tuple[str, str]]:
    """Write pictures of one colour with noise; return name and colour of each, colours in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    found = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        pixels = np.array(COLOURS[colour]) + random.integers(-20, 20, (16, 20, 3))
        name = f"{number:04}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
        found.append((name, colour))
    return found


def caption_file(path: Path, images: list[tuple[str, str]]) -> Path:
    """Write captions of pictures in the form of LAVIS's lists."""
    return write_json(
        path,
        [{"image": name, "caption": [f"a {colour} picture", f"a picture that is {colour}"]} for name, colour in images],
    )


def conversation_file(path: Path, images: list[tuple[str, str]], turns: int = 1) -> Path:
    """Write conversations about pictures in LLaVA's form, and one without a picture if there are several turns."""
    entries: list[dict[str, Any]] = []
    for name, colour in images:
        messages = [
            {
                "from": "human",
                "value": "<image>\nWhat colour is it?\nAnswer the question using a single word or phrase.",
            },
            {"from": "gpt", "value": colour},
        ]
        messages += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes"}] * (turns - 1)
        entries.append({"id": name, "image": name, "conversations": messages})
    if turns > 1:
        chat = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
        entries.append({"id": "chat", "conversations": chat})
    return write_json(path, entries)


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def language_model_folder(folder: Path) -> Path:
    """Write tokenizer and configuration of a Llama of two layers, width 32, and its weights."""
    tokenizer = tiny_models.byte_tokenizer()
    tokenizer.save_pretrained(folder)
    transformers = stock_library("transformers")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
