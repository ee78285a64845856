"""Oracle: the model before it was saved; its logits are those of the loaded one, to the last bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library
from lcl_megatron.evaluation.vision_language.assembly import (
    Assembled,
    AssemblyError,
    Recipe,
    assemble,
    load_model,
    save_model,
)
from lcl_megatron.evaluation.vision_language.model import PARTS
from lcl_megatron.evaluation.vision_language.sequences import Piece, collate
from tests.evaluation.vision_language.small_data import ENCODER, language_model_folder

try:
    stock_library("transformers")
    stock_library("timm")
except LibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = language_model_folder(tmp_path_factory.mktemp("language_model"))
    return Recipe(ENCODER, str(folder), connector_layers=2, max_length=64, image_fit="pad")


def logits(assembled: Assembled) -> torch.Tensor:
    pixels = torch.arange(3 * 16 * 16).remainder(255).to(torch.uint8).view(1, 3, 16, 16)
    batch = collate([assembled.builder.build([Piece("<image>\nWhat is it?")], 1)], pixels)
    with torch.no_grad():
        return assembled.model.logits(assembled.model.embed(batch))


def change(assembled: Assembled, parts: Any) -> None:
    """Make the weights of some parts others, as training would."""
    assembled.model.set_trained(parts)
    for part in parts:
        for parameter in assembled.model.get_submodule(part).parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("parts", [("connector",), ("connector", "language_model"), PARTS])
def test_a_saved_model_is_the_same_again(recipe: Recipe, tmp_path: Path, parts: Any) -> None:
    assembled = assemble(recipe, CPU, seed=3)
    change(assembled, parts)
    save_model(assembled, tmp_path / "model")
    loaded = load_model(tmp_path / "model", CPU)
    assert (logits(loaded) == logits(assembled)).all()
    saved = {path.name for path in (tmp_path / "model").iterdir()}
    assert ("encoder.safetensors" in saved) == ("encoder" in parts)
    assert ("language_model" in saved) == ("language_model" in parts)


def test_seeds_make_connectors(recipe: Recipe) -> None:
    first, again, other = (logits(assemble(recipe, CPU, seed=seed)) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first - other).abs().max() > 1e-4


def test_an_untrained_language_model(recipe: Recipe) -> None:
    untrained = dataclasses.replace(recipe, language_model=f"random:{recipe.language_model}")
    first, again, other = (
        assemble(untrained, CPU, seed=seed).model.language_model.lm_head.weight for seed in (0, 0, 1)
    )
    assert (first == again).all()
    assert (first != other).any()


def test_the_recipe_can_be_changed_when_a_model_is_taken_further(recipe: Recipe, tmp_path: Path) -> None:
    save_model(assemble(recipe, CPU), tmp_path)
    longer = load_model(tmp_path, CPU, change=lambda saved: dataclasses.replace(saved, max_length=100))
    assert longer.builder.max_length == 100


def test_what_cannot_be_assembled(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(AssemblyError, match="max_length = 999, but .* has 256 positions; set fewer"):
        assemble(dataclasses.replace(recipe, max_length=999), CPU)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssemblyError, match="language model '.*empty' cannot be loaded: .*; give a folder with"):
        assemble(dataclasses.replace(recipe, language_model=str(tmp_path / "empty")), CPU)


def test_a_tokenizer_of_another_model(recipe: Recipe, tmp_path: Path) -> None:
    folder = language_model_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(AssemblyError, match="the tokenizer has .* tokens, the model 100; they do not belong together"):
        assemble(dataclasses.replace(recipe, language_model=f"random:{folder}"), CPU)


def test_damaged_folders(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(AssemblyError, match="has no model.json; give a folder of a trained model"):
        load_model(tmp_path, CPU)
    save_model(assemble(recipe, CPU), tmp_path)
    connector = tmp_path / "connector.safetensors"
    connector.write_bytes(connector.read_bytes()[:100])
    with pytest.raises(AssemblyError, match="connector.safetensors is missing, damaged or of another model"):
        load_model(tmp_path, CPU)
    (tmp_path / "model.json").write_text('{"format": 2}')
    with pytest.raises(AssemblyError, match=r"model.json describes no model of this version \(fields format\)"):
        load_model(tmp_path, CPU)


def test_another_encoder_than_the_model_was_trained_with(recipe: Recipe, tmp_path: Path) -> None:
    save_model(assemble(recipe, CPU), tmp_path)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(record | {"encoder": ENCODER.replace("depth=1", "depth=2")}))
    with pytest.raises(AssemblyError, match="was trained with encoder .* of fingerprint .*: put the old encoder back"):
        load_model(tmp_path, CPU)
