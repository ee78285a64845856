"""The model card of an export: what the model is, what it was trained on, its figures, how to load it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcl_megatron.checkpoint.convert import timm_vit
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.checkpoint.weights import ModelWeights
from lcl_megatron.config.toml import NONE

_LEFT_OUT = {"curves", "settings", "data", "versions", "seconds", "step", "time"}
"""Parts of evaluation results that are no figures of the model."""
_MOST_FIGURES = 60

_LOADING = {
    "vision": """
timm; `drop_path_rate`, `img_size`, `features_only`, `global_pool="map"` work as for any of its models:

```python
import timm
import torch
from PIL import Image

image = Image.open("cat.jpg").convert("RGB")
encoder = timm.create_model("local-dir:EXPORT", pretrained=True, num_classes=0).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder), is_training=False)
with torch.no_grad():
    tokens = encoder.forward_features(transform(image)[None])  # class token, if there is one, then patches; normalised
```

transformers:

```python
from transformers import AutoImageProcessor, AutoModel

encoder = AutoModel.from_pretrained("EXPORT").eval()
pixels = AutoImageProcessor.from_pretrained("EXPORT")(image, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    tokens = encoder(pixel_values=pixels).last_hidden_state
```
""",
    "clip_vision": """
CLIPVisionModel, as LLaVA reads it (without timm); its `last_hidden_state` is before the last LayerNorm:

```python
from transformers import CLIPVisionModel

tower = CLIPVisionModel.from_pretrained("EXPORT/clip_vision").eval()
with torch.no_grad():
    patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
```
""",
    "language_model": """
The language model:

```python
from transformers import AutoTokenizer, OPTForCausalLM

tokenizer = AutoTokenizer.from_pretrained("EXPORT/language_model")
model = OPTForCausalLM.from_pretrained("EXPORT/language_model").eval()
print(tokenizer.batch_decode(model.generate(**tokenizer("A photo of", return_tensors="pt"), max_new_tokens=20)))
```
""",
    "whole_model": """
The whole model; where lcl_megatron is not installed, pass `trust_remote_code=True` in place of its import:

```python
import lcl_megatron.hf
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("EXPORT/lcl").eval()
processor = AutoProcessor.from_pretrained("EXPORT/lcl")
inputs = processor(images=[image], text="<BoI><image><EoI>", return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True))
```
""",
}
"""How each folder is loaded, by name of its target."""


@dataclass(frozen=True)
class Card:
    """What a model card is written from."""

    weights: ModelWeights
    """The model."""
    skipped: dict[str, str | None]
    """Name of each target that was wanted -> why it was skipped, or None."""
    metrics: tuple[Path, ...] = ()
    """Files with figures."""


def card_text(card: Card) -> str:
    """Return the text of README.md, with the metadata that the Hugging Face Hub reads.

    Raises:
        CheckpointError: a file of figures holds none.
        LibraryError: huggingface_hub is not installed.
        OSError: a file of figures cannot be read.
    """
    hub = stock_library("huggingface_hub")
    has_timm = card.skipped.get("vision") is None
    data = hub.ModelCardData(
        library_name="timm" if has_timm else "transformers",
        pipeline_tag="image-feature-extraction",
        tags=["lcl", "vision", "pre-training", "interleaved-image-text"],
    )
    sections = [
        "# Vision encoder pre-trained with Latent Compression Learning",
        "[LCL](https://arxiv.org/abs/2406.07543) trains a Vision Transformer, which turns images into latents, and a "
        "causal language model that reads text and latents; the losses are next-token prediction and a contrast "
        "of each image with the text before it.",
        "## How to load it\n" + "".join(_loading(card)).rstrip(),
        "## Training\n\n" + _table(_training(card.weights)),
        "## Data\n\n" + _table(_data(card.weights)),
        "## Architecture\n\n" + _table(_architecture(card.weights)),
        *(f"## Figures: {path.name}\n\n" + _table(figures(path)) for path in card.metrics),
        "## Limits\n\nPixels are normalised with CLIP's mean and standard deviation. Nothing but the losses above "
        "shaped the model: it has not been aligned or filtered, and repeats what its data says.",
    ]
    card_object = hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    return str(card_object.content)


def figures(path: Path) -> list[tuple[str, str]]:
    """Return names and values of the figures in a file.

    Args:
        path: ``.jsonl`` = reports of a run, of which the last is taken; otherwise JSON, of which all numbers are taken
            but settings and curves.

    Raises:
        CheckpointError: the file is not JSON, or there is no number in it.
        OSError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        value = _last_report(text) if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path} holds no figures: {error}; give metrics.jsonl of a run or JSON results"
        ) from error
    found = [(name, f"{number:.6g}") for name, number in _numbers(value, "")]
    if not found:
        raise CheckpointError(f"{path} holds no figures; give metrics.jsonl of a run or JSON results of an evaluation")
    left_out = len(found) - _MOST_FIGURES
    more = [(f"and {left_out} more", "")] if left_out > 0 else []
    return found[:_MOST_FIGURES] + more


def _last_report(text: str) -> Any:
    """Return the last whole line; the last one of all may be cut off where the run ended."""
    lines = text.splitlines()
    for line in reversed(lines[-2:]):
        try:
            report = json.loads(line)
            return {f"at step {report['step']}": report} if "step" in report else report
        except ValueError:
            continue
    raise ValueError("its last lines are no JSON")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        if math.isfinite(value):
            yield name, float(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _LEFT_OUT:
                yield from _numbers(item, f"{name}: {key}" if name else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{name}: {_label(item, index)}" if name else _label(item, index))


def _label(item: Any, index: int) -> str:
    """Return what an entry of a list is about."""
    if isinstance(item, dict):
        words = [item[key] for key in ("task", "encoder", "mode", "name") if isinstance(item.get(key), str)]
        return ", ".join(words) or str(index)
    return str(index)


def _loading(card: Card) -> Iterator[str]:
    for name, reason in card.skipped.items():
        yield _LOADING[name] if reason is None else f"\nThere is no folder for `{name}`: {reason}.\n"


def _training(weights: ModelWeights) -> Iterator[tuple[str, Any]]:
    config, progress = weights.config, weights.progress
    if progress is not None:
        yield "optimizer steps", f"{progress.step:,}"
        yield "rows", f"{progress.consumed_rows:,} of up to {config.data.seq_length:,} tokens"
        yield "images", f"{progress.consumed_images:,}"
    else:
        yield "origin", "weights that were imported; no run of lcl_megatron has changed them"
    for section, names in {
        "training": ("global_batch_size", "precision", "seed"),
        "optimizer": ("lr", "min_lr", "lr_warmup_iters", "weight_decay", "adam_beta1", "adam_beta2"),
        "loss": ("generation_loss_weight", "contrastive_loss_weight"),
    }.items():
        for name in names:
            yield f"`{section}.{name}`", getattr(getattr(config, section), name)


def _data(weights: ModelWeights) -> Iterator[tuple[str, Any]]:
    data, progress = weights.config.data, weights.progress
    yield "corpora", ", ".join(f"`{Path(path).name}`" for path in data.data_path) or "not recorded"
    if data.mixture_weights:
        yield f"shares, by {data.mixture_by}", " : ".join(f"{weight:g}" for weight in data.mixture_weights)
    yield "view", ", ".join(data.view)
    for name in (
        "layout",
        "seq_length",
        "max_images_per_document",
        "too_many_images",
        "min_similarity",
        "context_rule",
    ):
        yield f"`data.{name}`", getattr(data, name)
    for name, value in (progress.data if progress else {}).items():
        if name.startswith(("data.", "training.")):
            continue
        # What is long is a fingerprint.
        yield name, value if len(value) <= 60 else f"{value[:57]}..."


def _architecture(weights: ModelWeights) -> Iterator[tuple[str, Any]]:
    config = weights.config
    counts = {
        name: sum(tensor.numel() for key, tensor in weights.state.items() if key.startswith(f"{name}."))
        for name in ("vision", "pool", "language")
    }
    yield "parameters", ", ".join(f"{name} {count:,}" for name, count in counts.items())
    if timm_vit.refusal(config) is None:
        yield "timm architecture", f"`{timm_vit.architecture_of(config.vision)[0]}`, arguments in `config.json`"
    for section in ("vision", "pool", "language"):
        for name, value in vars(getattr(config, section)).items():
            yield f"`{section}.{name}`", NONE if value is None else value


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {value} |".replace("\n", " ") for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])
