"""From what the user wrote behind ``--encoder`` to an ``ImageEncoder``."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lcl_megatron.checkpoint.refused_pickles import what_failed
from lcl_megatron.checkpoint.stock_libraries import LibraryError
from lcl_megatron.evaluation.encoders.encoder import EncoderError, ImageEncoder
from lcl_megatron.evaluation.encoders.stock import clip_encoder, open_clip_encoder, timm_encoder

FORMS = (
    "an exported folder, timm:NAME, open_clip:MODEL/PRETRAINED, open_clip:MODEL/FILE, clip:NAME_OR_FOLDER, "
    "or random:TIMM_NAME or random:FOLDER (of an export) for an untrained one; timm: and random: take arguments, "
    "random:NAME?img_size=64,depth=4"
)
"""What an encoder may be, for messages."""
NAMED = re.compile(r"([^:?/=]+)=(.+)", re.DOTALL)
"""``NAME=ENCODER``: what an encoder shall be called in tables."""


def load_encoder(spec: str, drop_path_rate: float = 0.0, seed: int = 0) -> ImageEncoder:
    """Return an encoder in evaluation mode, in float32 on the CPU.

    Args:
        spec: see ``FORMS``, with ``NAME=`` before it or not. Names may need the network, folders and files never do.
        drop_path_rate: probability of dropping a residual branch in the last layer, linear from 0 in the first; acts
            in training mode.
        seed: of the weights of ``random:``.

    Raises:
        EncoderError: there is no such encoder, it cannot be loaded, or it has no patch features.
        LibraryError: its library is not installed.
    """
    if (named := NAMED.fullmatch(spec)) is not None and not Path(spec).is_dir():
        encoder = load_encoder(named[2], drop_path_rate, seed)
        encoder.name = named[1]
        return encoder
    kind, colon, name = spec.partition(":")
    if not colon or Path(spec).is_dir():
        return _from_folder(spec, Path(spec), drop_path_rate)
    if not name:
        raise EncoderError(f"encoder {spec!r} names nothing behind the colon; expected {FORMS}")
    try:
        if kind == "timm":
            model, arguments = _arguments(spec, name)
            return timm_encoder(spec, model, True, arguments | {"drop_path_rate": drop_path_rate})
        if kind == "random":
            return _untrained(spec, name, drop_path_rate, seed)
        if kind == "open_clip":
            model, slash, pretrained = name.partition("/")
            if not slash or not pretrained:
                raise EncoderError(f"encoder {spec!r}: expected open_clip:MODEL/PRETRAINED or open_clip:MODEL/FILE")
            return open_clip_encoder(spec, model, pretrained, drop_path_rate)
        if kind == "clip":
            return clip_encoder(spec, name, drop_path_rate)
    except (EncoderError, LibraryError, ImportError):
        raise
    except (OSError, ValueError, RuntimeError, TypeError, UnpicklingError) as error:
        # Libraries raise all of these for unknown names, absent files, wrong arguments and missing networks.
        raise _cannot_load(spec, error) from error
    raise EncoderError(f"encoder {spec!r}: unknown kind {kind!r}; expected {FORMS}")


def _untrained(spec: str, name: str, drop_path_rate: float, seed: int) -> ImageEncoder:
    """Return an architecture of timm, or that of an exported folder, with random weights."""
    model, arguments = _arguments(spec, name)
    if (folder := Path(model)).is_dir():
        if (kind := _model_type(folder)) != "timm_wrapper":
            raise EncoderError(
                f"encoder {spec!r}: {folder / 'config.json'} has model_type {kind!r}; random: takes the architecture "
                "of a timm_wrapper folder: give the folder that an export wrote, not one inside it"
            )
        model = f"local-dir:{folder}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return timm_encoder(spec, model, False, arguments | {"drop_path_rate": drop_path_rate})


def encoder_name(spec: str) -> str:
    """Return what ``load_encoder`` calls an encoder in tables and file names; nothing is loaded."""
    if Path(spec).is_dir():
        return Path(spec).resolve().name
    if (named := NAMED.fullmatch(spec)) is not None:
        return named[1]
    return spec if ":" in spec else Path(spec).resolve().name


def _from_folder(spec: str, folder: Path, drop_path_rate: float) -> ImageEncoder:
    """Return the encoder of an exported folder; its configuration says which library reads it."""
    if not folder.is_dir():
        raise EncoderError(f"encoder {spec!r}: there is no such folder; expected {FORMS}")
    name = folder.resolve().name
    try:
        if (folder / "open_clip_config.json").is_file():
            return open_clip_encoder(name, f"local-dir:{folder}", None, drop_path_rate)
        kind = _model_type(folder)
        if kind == "timm_wrapper":
            return timm_encoder(name, f"local-dir:{folder}", True, {"drop_path_rate": drop_path_rate})
        if kind in ("clip", "clip_vision_model"):
            return clip_encoder(name, str(folder), drop_path_rate)
    except (EncoderError, LibraryError):
        raise
    except (OSError, ValueError, RuntimeError, TypeError, UnpicklingError) as error:
        raise _cannot_load(spec, error) from error
    raise EncoderError(
        f"encoder {spec!r}: {folder / 'config.json'} has model_type {kind!r}; expected timm_wrapper, clip or "
        "clip_vision_model: give a folder that tools/convert_checkpoint.py export wrote"
    )


def _cannot_load(spec: str, error: Exception) -> EncoderError:
    return EncoderError(
        f"encoder {spec!r} cannot be loaded: {type(error).__name__}: {what_failed(error)}; check the name or the files "
        "(names are fetched from the network, folders are not)"
    )


def _model_type(folder: Path) -> Any:
    config = folder / "config.json"
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise EncoderError(
            f"encoder {str(folder)!r}: {config} is missing; give an exported folder (a training checkpoint becomes one "
            "by tools/convert_checkpoint.py export CHECKPOINT FOLDER)"
        ) from None
    except (ValueError, AttributeError) as error:
        raise EncoderError(f"encoder {str(folder)!r}: {config} is no JSON object ({error}); export it again") from None


def _arguments(spec: str, name: str) -> tuple[str, dict[str, Any]]:
    """Return the model's name and the arguments behind its question mark: ``?img_size=64,depth=4``."""
    model, mark, text = name.partition("?")
    if not mark:
        return model, {}
    try:
        return model, tomllib.loads("\n".join(text.split(",")))
    except tomllib.TOMLDecodeError as error:
        raise EncoderError(
            f"encoder {spec!r}: {text!r} are no arguments ({error}); write them as NAME?img_size=64,depth=4"
        ) from error
