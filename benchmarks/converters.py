"""How far exports and imports are from the models that they come from, with random weights of a preset's size.

python benchmarks/converters.py                             the tiny preset, seconds
python benchmarks/converters.py --preset vit_b16_opt125m    the figures of docs/export.md, minutes; 5 GB of disk

No parameter is 0 or 1, so that a wrong map of names shows. Runs what ``tools/convert_checkpoint.py`` runs: ``export
--whole-model --verify``; ``import --verify`` of vision towers of the same size, built by transformers, open_clip and
timm; ``official --verify``, and ``import --verify`` of the file that it wrote. Nothing is downloaded.

The last line is one JSON object. ``timm``, ``auto_model``, ``clip_vision``, ``language_model``, ``whole_model``: the
largest absolute difference between an exported folder's outputs, in float32, and the model's own. ``from_clip``,
``from_open_clip``, ``from_timm``, ``official``, ``from_official``: between features of a library's own tower and of
ours. ``*_round_trip`` and ``*_written``: between weights there and back, and weights read back; 0 = the same bits.
``passed``: whether all are within the tolerance of ``--verify``; if not, the exit status is 1.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn

from lcl_megatron.checkpoint import commands
from lcl_megatron.checkpoint.commands import Outcome
from lcl_megatron.checkpoint.convert.importing import ImportOptions
from lcl_megatron.checkpoint.convert.official_file import Heads
from lcl_megatron.checkpoint.parameters import parameter_shapes
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.checkpoint.weights import ModelWeights, write_weights
from lcl_megatron.config import RunConfig, VisionConfig
from lcl_megatron.config.sources import preset_text
from lcl_megatron.config.toml import from_toml
from lcl_megatron.data.tokenizer import train_tokenizer
from lcl_megatron.versions import software_versions

TEXTS = tuple(" ".join(f"word{(7 * n + k) % 90}" for k in range(12)) for n in range(90))
"""Made-up sentences, for the tokenizer."""
EMBEDDINGS = ("embeddings", "embedding.weight", "class_embedding", "positional_embedding", "pos_embed", "cls_token")
"""Parts of the names, in any of the libraries, of what is looked up and not multiplied with."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is measured."""

    preset: str = "tiny"
    """Shipped configuration, whose sizes the models have."""
    vocab_size: int = 50272
    """Size of the vocabulary where the preset has none, that of OPT; the made-up tokenizer is smaller."""
    folder: Path | None = None
    """Folder that everything is written into and kept, which must not exist; none = a temporary one."""

    def config(self) -> RunConfig:
        """Return the configuration of the model."""
        config = from_toml(preset_text(self.preset), f"preset {self.preset}")
        if config.language.vocab_size:
            return config
        return dataclasses.replace(config, language=dataclasses.replace(config.language, vocab_size=self.vocab_size))


def random_parameter(name: str, shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return float32 values that are neither 0 nor 1, and under which activations stay of order 1."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1 and name.endswith(".gamma"):
        return 0.4 + 0.1 * noise
    if len(shape) == 1 and name.endswith(".weight"):
        return 1 + 0.2 * noise
    if len(shape) > 1 and not any(part in name for part in EMBEDDINGS):
        return noise / noise[0].numel() ** 0.5
    return 0.3 * noise


def random_weights(config: RunConfig, tokenizer: bytes | None = None) -> ModelWeights:
    """Return a model of ours."""
    generator = torch.Generator().manual_seed(0)
    state = {name: random_parameter(name, shape, generator) for name, shape in parameter_shapes(config).items()}
    return ModelWeights(config, state, tokenizer)


@torch.no_grad()
def randomize(module: nn.Module) -> Any:
    """Return a library's model, with other values in all of its parameters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.copy_(random_parameter(name, parameter.shape, generator))
    return module


def write_clip(vision: VisionConfig, folder: Path) -> str:
    """Write a CLIPVisionModel; return it as a source of ``import``."""
    transformers = stock_library("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act="quick_gelu",
    )
    randomize(transformers.CLIPVisionModel(config)).save_pretrained(folder)
    return f"clip:{folder}"


def write_open_clip(vision: VisionConfig, folder: Path) -> str:
    """Write an open_clip model, with a text tower as small as can be; return it as a source of ``import``."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "width": vision.hidden_size,
            "layers": vision.num_layers,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1},
    }
    model = randomize(stock_library("open_clip").CLIP(**config))
    folder.mkdir()
    described = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"open_clip:local-dir:{folder}"


def write_timm(vision: VisionConfig, folder: Path) -> str:
    """Write a CLIP tower of timm, with LayerScale; return it as a source of ``import``."""
    architecture = "vit_base_patch16_clip_224"
    arguments = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.hidden_size,
        "depth": vision.num_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
        "init_values": 0.1,
    }
    model = randomize(stock_library("timm").create_model(architecture, num_classes=0, **arguments))
    folder.mkdir()
    described = {"architecture": architecture, "num_classes": 0, "model_args": arguments, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return f"timm:local-dir:{folder}"


SOURCES = {"clip": write_clip, "open_clip": write_open_clip, "timm": write_timm}
"""Libraries that towers are imported from."""


def released_recipe(config: RunConfig) -> RunConfig:
    """Return the same sizes as a model that the released code can run."""
    recipe = from_toml(preset_text("official_b16"), "preset official_b16")
    sizes = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"}
    of_vision = {name: getattr(config.vision, name) for name in sizes | {"image_size", "patch_size"}}
    of_language = {name: getattr(config.language, name) for name in sizes | {"vocab_size", "max_position_embeddings"}}
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(recipe.vision, **of_vision),
        language=dataclasses.replace(recipe.language, **of_language),
    )


def conversions(config: RunConfig, folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Yield what is converted, and what the command says; each model is forgotten before the next is made."""
    tokenizer = train_tokenizer(TEXTS, folder / "tokenizer.model", 400)
    write_weights(random_weights(config, tokenizer.model), folder / "weights")
    yield "export", commands.export(folder / "weights", folder / "export", whole_model=True, verify=True)

    for library, write in SOURCES.items():
        source, output = write(config.vision, folder / library), folder / f"from_{library}"
        yield output.name, commands.import_source(source, output, ImportOptions(), verify=True)

    released = released_recipe(config)
    write_weights(random_weights(released), folder / "released_weights")
    file = folder / "released.pt"
    yield "official", commands.official(folder / "released_weights", file, verify=True)

    heads = (section.num_attention_heads for section in (released.vision, released.pool, released.language))
    options = ImportOptions(heads=Heads(**dict(zip(("vision", "pool", "language"), heads, strict=True))))
    yield "from_official", commands.import_source(str(file), folder / "from_official", options, verify=True)


def figures(name: str, outcome: Outcome) -> dict[str, float]:
    """Return the differences of a conversion; the one between features is called as the conversion itself."""
    found: dict[str, float] = json.loads(outcome.text.splitlines()[-1])
    own = ("round_trip", "written")
    if name == "export":
        return {f"export_{key}" if key in own else key: value for key, value in found.items()}
    return {f"{name}_{key}" if key in own else name: value for key, value in found.items()}


def main() -> None:
    """Read the flags, convert in all directions, print; exit with status 1 if anything is beyond its tolerance."""
    flags = tyro.cli(Flags, description=__doc__)
    os.environ["HF_HUB_OFFLINE"] = "1"
    config = flags.config()
    report: dict[str, Any] = {}
    status = 0
    with tempfile.TemporaryDirectory(prefix="converters-") as temporary:
        folder = flags.folder or Path(temporary) / "converters"
        folder.mkdir(parents=True)
        for name, outcome in conversions(config, folder):
            shown = [line for line in outcome.text.splitlines() if line.startswith(" ") or ": skipped: " in line]
            print("\n".join([name, *shown]), flush=True)
            report |= figures(name, outcome)
            status = max(status, outcome.status)
    parameters = sum(torch.Size(shape).numel() for shape in parameter_shapes(config).values())
    settings = {"preset": flags.preset, "parameters": parameters, "versions": software_versions()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({**report, "passed": status == 0, "peak_rss_gib": peak, **settings}))
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
