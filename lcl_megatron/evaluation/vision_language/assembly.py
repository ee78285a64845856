"""From names to a model: encoder, language model and tokenizer by name or folder, and trained models in folders.

A saved model is a folder::

    model.json               what it is made of; which parts were trained
    connector.safetensors    the connector
    encoder.safetensors      the encoder's weights, if it was trained
    language_model/          the language model and its tokenizer as transformers saves them, if it was trained

Parts that were not trained are not copied; they are loaded from where they came from, and the encoder's fingerprint
tells whether it is still the same.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lcl_megatron.checkpoint.refused_pickles import what_failed
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.checkpoint.tensor_files import write_tensors
from lcl_megatron.evaluation.encoders.encoder import ImageEncoder
from lcl_megatron.evaluation.encoders.load import load_encoder
from lcl_megatron.evaluation.vision_language.model import Connector, VisionLanguageModel
from lcl_megatron.evaluation.vision_language.pixels import ImageFit
from lcl_megatron.evaluation.vision_language.sequences import SequenceBuilder

RECIPE_FILE = "model.json"
LANGUAGE_MODEL_FOLDER = "language_model"
RANDOM = "random:"
"""Before a folder or name: only its configuration and tokenizer are read, and the weights are random."""


class AssemblyError(ValueError):
    """A model that cannot be put together or loaded; the message names the part."""


@dataclass(frozen=True)
class Recipe:
    """What a vision-language model is made of."""

    encoder: str
    """See ``load_encoder``."""
    language_model: str
    """Folder or name of a causal language model of transformers; with ``random:`` before it, untrained."""
    connector_layers: int
    """Linear layers of the connector."""
    max_length: int
    """Positions of a sequence, images included."""
    image_fit: ImageFit
    """How images become square."""


@dataclass(frozen=True)
class Assembled:
    """A model with what it needs to read texts and images."""

    recipe: Recipe
    """What it is made of."""
    model: VisionLanguageModel
    """In float32, in evaluation mode, nothing trained yet."""
    encoder: ImageEncoder
    """The model's encoder."""
    tokenizer: Any
    """The language model's."""
    builder: SequenceBuilder
    """Makes its sequences."""

    @property
    def pad_token_id(self) -> int:
        """What generated sequences are filled up with."""
        token = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if token is None else token)


def assemble(recipe: Recipe, device: torch.device, seed: int = 0, drop_path_rate: float = 0.0) -> Assembled:
    """Return a model whose connector is untrained.

    Args:
        recipe: what it is made of.
        device: where it goes.
        seed: of the connector, and of an untrained language model.
        drop_path_rate: of the encoder, where it is trained.

    Raises:
        EncoderError: the encoder cannot be loaded.
        AssemblyError: the language model or its tokenizer cannot, or sequences are too long for it.
        LibraryError: transformers is not installed.
    """
    encoder = load_encoder(recipe.encoder, drop_path_rate)
    language_model, tokenizer = _load_language_model(recipe.language_model, seed)
    embeddings = language_model.get_input_embeddings().weight
    if len(tokenizer) > len(embeddings):
        raise AssemblyError(
            f"{recipe.language_model}: the tokenizer has {len(tokenizer)} tokens, the model {len(embeddings)}; "
            "they do not belong together"
        )
    limit = getattr(language_model.config, "max_position_embeddings", None)
    if limit is not None and recipe.max_length > limit:
        raise AssemblyError(
            f"max_length = {recipe.max_length}, but {recipe.language_model} has {limit} positions; set fewer"
        )
    torch.manual_seed(seed)
    connector = Connector(encoder.width, embeddings.shape[1], recipe.connector_layers)
    model = VisionLanguageModel(encoder, connector, language_model).to(device).eval()
    builder = SequenceBuilder(tokenizer, encoder.num_patches, recipe.max_length)
    return Assembled(recipe, model, encoder, tokenizer, builder)


def _load_language_model(source: str, seed: int) -> tuple[Any, Any]:
    """Return a causal language model in float32 and its tokenizer."""
    transformers = stock_library("transformers")
    # Bars of every rank would run through the log of a long job.
    stock_library("transformers.utils.logging").disable_progress_bar()
    name = source.removeprefix(RANDOM)
    try:
        # Said, and not left out: transformers would ask on the terminal whether to run the code of the folder.
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if source.startswith(RANDOM):
            torch.manual_seed(seed)
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
        raise AssemblyError(
            f"language model {source!r} cannot be loaded: {type(error).__name__}: {_first_line(error)}; "
            "give a folder with "
            "config.json, weights and tokenizer of a causal language model, or a name on the hub (needs the network)"
        ) from error
    return model.float(), tokenizer


def _first_line(error: Exception) -> str:
    """Return what libraries say before they go on for pages."""
    return (what_failed(error).splitlines() or [""])[0]


def save_model(assembled: Assembled, folder: Path) -> None:
    """Write a model to a folder, which is made if it is missing; see the module's text.

    Parts that are marked as trained are written, and the connector always.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = assembled.model
    _save_weights(model.connector, folder / "connector.safetensors")
    if "encoder" in model.trained:
        _save_weights(assembled.encoder.model, folder / "encoder.safetensors")
    if "language_model" in model.trained:
        model.language_model.save_pretrained(folder / LANGUAGE_MODEL_FOLDER)
        assembled.tokenizer.save_pretrained(folder / LANGUAGE_MODEL_FOLDER)
    record = {
        "format": 1,
        **dataclasses.asdict(assembled.recipe),
        "encoder_fingerprint": assembled.encoder.fingerprint(),
        "trained": sorted(model.trained),
    }
    # Written last: a folder with this file is complete.
    (folder / RECIPE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_model(
    folder: Path,
    device: torch.device,
    drop_path_rate: float = 0.0,
    change: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> Assembled:
    """Return a model that ``save_model`` wrote.

    Args:
        folder: where it lies.
        device: where it goes.
        drop_path_rate: of the encoder, where it is trained further.
        change: what of the recipe shall be otherwise from now on, such as ``max_length``.

    Raises:
        AssemblyError: the folder is incomplete or damaged, or its encoder is not the one the model was trained with.
        EncoderError: the encoder cannot be loaded.
    """
    record = _read_record(folder)
    recipe = Recipe(**{field.name: record[field.name] for field in dataclasses.fields(Recipe)})
    trained_language_model = folder / LANGUAGE_MODEL_FOLDER
    if "language_model" in record["trained"]:
        recipe = dataclasses.replace(recipe, language_model=str(trained_language_model))
    assembled = assemble(change(recipe), device, drop_path_rate=drop_path_rate)
    _load_weights(assembled.model.connector, folder / "connector.safetensors")
    if "encoder" in record["trained"]:
        _load_weights(assembled.encoder.model, folder / "encoder.safetensors")
    found = assembled.encoder.fingerprint()
    if found != record["encoder_fingerprint"]:
        raise AssemblyError(
            f"{folder} was trained with encoder {recipe.encoder!r} of fingerprint {record['encoder_fingerprint']}; "
            f"it is {found} now: put the old encoder back, or train again"
        )
    return assembled


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Recipe)} | {"format", "encoder_fingerprint", "trained"}
        if record.keys() != known or record["format"] != 1:
            raise ValueError(f"fields {', '.join(sorted(record))}")
    except FileNotFoundError as error:
        raise AssemblyError(
            f"{folder} has no {RECIPE_FILE}; give a folder of a trained model, OUTPUT/models/NAME of an earlier call"
        ) from error
    except (ValueError, AttributeError) as error:
        raise AssemblyError(f"{path} describes no model of this version ({error}); train the model again") from error
    return record


def _save_weights(module: nn.Module, path: Path) -> None:
    # A copy of each: safetensors refuses tensors that share memory.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in module.state_dict().items()}
    write_tensors(state, path)


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AssemblyError(
            f"{path} is missing, damaged or of another model ({error}); train the model again"
        ) from error
