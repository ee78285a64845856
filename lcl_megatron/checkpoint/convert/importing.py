"""Weights from elsewhere as a weights folder, from which a run starts (``--init-weights``) or an export is made.

| source | what it is |
|---|---|
| ``FILE.pt``, ``FILE.safetensors`` | a model of the released LCL code |
| ``clip:DIR_OR_NAME`` | transformers' ``CLIPModel`` or ``CLIPVisionModel`` |
| ``open_clip:MODEL/PRETRAINED``, ``open_clip:MODEL/FILE``, ``open_clip:local-dir:DIR`` | open_clip |
| ``timm:NAME``, ``timm:local-dir:DIR`` | timm's ``vit_*_clip_*`` |
| ``DIR`` | a folder of any of these, a training checkpoint, a weights folder |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from lcl_megatron.checkpoint.convert.measurement import Measurement
from lcl_megatron.checkpoint.convert.official_file import (
    DTYPES,
    Heads,
    Precision,
    infer_config,
    official_state,
    official_tower,
    official_weights,
    read_official_state,
)
from lcl_megatron.checkpoint.convert.positions import for_image_size
from lcl_megatron.checkpoint.convert.stock_clip import load_clip
from lcl_megatron.checkpoint.convert.stock_open_clip import load_open_clip
from lcl_megatron.checkpoint.convert.stock_timm import load_timm
from lcl_megatron.checkpoint.convert.stock_tower import StockTower
from lcl_megatron.checkpoint.convert.table import export_tensors, import_tensors
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.weights import ModelWeights, read_weights, write_weights
from lcl_megatron.config import RunConfig

Part = Literal["vision", "pool", "language", "logit_scale"]
"""A part of the model."""
_LIBRARIES = {"clip": load_clip, "open_clip": load_open_clip, "timm": load_timm}
_FILES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What may be changed on the way."""

    image_size: int = 0
    """Side of the images that the vision tower shall read, in pixels: its position embeddings are resampled (bicubic).
    0 = as in the source."""
    parts: tuple[Part, ...] = ()
    """Parts to keep; empty = all that the source has. The language model of a released file knows CLIP's token ids, and
    not those of a corpus: keep ``vision pool`` to train on one."""
    heads: Heads = field(default_factory=Heads)
    """Attention heads of a released file."""


@dataclass(frozen=True)
class ImportSource:
    """Weights as read, and how to compare them with where they come from."""

    weights: ModelWeights
    """As this model's."""
    library: str = ""
    """Whose code computes ``stock``."""
    stock: Callable[[], StockTower] | None = None
    """The library's own vision tower with the source's weights; None = the source is this model's own."""
    original: Mapping[str, Tensor] = field(default_factory=dict)
    """The source's tensors, in float32, under its names."""
    back: Callable[[ModelWeights], Mapping[str, Tensor]] = lambda weights: {}
    """Converts ``weights`` back to the source's names."""

    def measurements(self) -> dict[str, Measurement]:
        """Return how far the weights are from where they come from; empty if they are this model's own.

        By library: its own code's features from ours, on the same images. ``round_trip``: the source's tensors from
        those converted to ours and back.
        """
        if self.stock is None:
            return {}
        # The only part that runs the model, and so needs megatron-core.
        from lcl_megatron.checkpoint.convert.parity import compare_features

        return {
            self.library: compare_features(self.stock(), self.weights),
            "round_trip": Measurement.of_weights(self.back(self.weights), self.original),
        }


def read_source(source: str, heads: Heads | None = None) -> ImportSource:
    """Read weights of any of the kinds in this module's table.

    Args:
        source: see there.
        heads: attention heads of a released file.

    Raises:
        CheckpointError: it is of no known kind, cannot be loaded, is damaged, or our model cannot hold it exactly.
        LibraryError: the library that reads it is not installed.
    """
    library, _, name = source.partition(":")
    if library in _LIBRARIES and name:
        return tower_source(_LIBRARIES[library](name), source)
    path = Path(source)
    if path.suffix in _FILES and path.is_file():
        return official_source(path, heads or Heads())
    if not path.is_dir():
        raise CheckpointError(
            f"{source}: there is no such file or folder, and it does not begin with clip:, open_clip: or timm:"
        )
    if (path / "open_clip_config.json").is_file():
        return tower_source(load_open_clip(f"local-dir:{path}"), source)
    if (path / "config.json").is_file():
        described = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "architecture" in described:
            return tower_source(load_timm(f"local-dir:{path}"), source)
        return tower_source(load_clip(str(path)), source)
    return ImportSource(read_weights(path))


def tower_source(stock: StockTower, source: str) -> ImportSource:
    """Return another library's vision tower as ours.

    Raises:
        CheckpointError: it has a parameter that ours has not, or lacks one; errors start with ``source``.
    """
    try:
        weights = ModelWeights(RunConfig(vision=stock.vision), import_tensors(stock.table, stock.state))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: our vision tower cannot hold it exactly: {error}") from error
    return ImportSource(
        weights, stock.library, lambda: stock, stock.state, lambda ours: export_tensors(stock.table, ours.state)
    )


def official_source(path: str | Path, heads: Heads) -> ImportSource:
    """Return a released file as a whole model; see ``official_file.read_official``."""
    state = read_official_state(path)
    config = infer_config(state, heads, str(path))
    return ImportSource(
        official_weights(state, config, str(path)),
        "open_clip",
        lambda: official_tower(state, config, str(path)),
        state,
        official_state,
    )


def import_weights(
    source: str, output: str | Path, options: ImportOptions, verify: bool = False
) -> tuple[ModelWeights, dict[str, Measurement]]:
    """Write a source as a weights folder.

    Args:
        source: see this module's table.
        output: the folder; must not exist.
        options: what may be changed on the way.
        verify: compare with the source, before anything is changed, and with what was written.

    Returns:
        The weights as written, and by name what was compared (see ``ImportSource.measurements``; ``written``: the files
        with the weights); nothing was compared without ``verify``.

    Raises:
        CheckpointError, LibraryError: see ``read_source``; or ``output`` exists.
    """
    read = read_source(source, options.heads)
    measurements = read.measurements() if verify else {}
    weights = only_parts(read.weights, options.parts) if options.parts else read.weights
    if options.image_size:
        weights = for_image_size(weights, options.image_size)
    write_weights(weights, output)
    if verify:
        measurements["written"] = Measurement.of_weights(read_weights(output).state, weights.state)
    return weights, measurements


def measure_released_file(path: str | Path, weights: ModelWeights, precision: Precision) -> dict[str, Measurement]:
    """Compare a file that ``write_official`` wrote with the weights, and open_clip's features of it with ours.

    Args:
        path: the file.
        weights: what it was made of.
        precision: number format in the file.

    Raises:
        CheckpointError: the file does not read back.
        LibraryError: open_clip is not installed.
    """
    config = weights.config
    heads = Heads(
        vision=config.vision.num_attention_heads,
        pool=config.pool.num_attention_heads,
        language=config.language.num_attention_heads,
    )
    written = official_source(path, heads)
    expected = {name: tensor.to(DTYPES[precision]) for name, tensor in official_state(weights).items()}
    return {**written.measurements(), "written": Measurement.of_weights(written.original, expected)}


def only_parts(weights: ModelWeights, parts: Sequence[str]) -> ModelWeights:
    """Return some parts of a model.

    Raises:
        CheckpointError: one of them is not there.
    """
    weights.require(*parts)
    state = {name: tensor for name, tensor in weights.state.items() if name.split(".")[0] in parts}
    tokenizer = weights.tokenizer if "language" in parts else None
    return dataclasses.replace(weights, state=state, tokenizer=tokenizer)
