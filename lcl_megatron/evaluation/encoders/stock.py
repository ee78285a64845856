"""Encoders as timm, open_clip and transformers load them, with their own weights and evaluation transforms."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.evaluation.encoders.encoder import EncoderError, ImageEncoder, add_drop_path
from lcl_megatron.evaluation.encoders.preprocessing import RESAMPLING, Interpolation, Preprocessing


def timm_encoder(name: str, model_name: str, pretrained: bool, arguments: dict[str, Any]) -> ImageEncoder:
    """Return a model of timm.

    The features are ``forward_features`` without its prefix tokens. A model whose last norm stands behind its pool
    (``fc_norm``, as in MAE's fine-tuning) has no norm of its tokens; that norm is applied to them.

    Args:
        name: how it is called in tables.
        model_name: what ``timm.create_model`` takes; ``local-dir:FOLDER`` reads a folder.
        pretrained: whether to load weights.
        arguments: of the model's constructor, such as ``img_size``.

    Raises:
        EncoderError: it has no patch tokens, or a transform that is not known here.
    """
    timm = stock_library("timm")
    model = timm.create_model(model_name, pretrained=pretrained, num_classes=0, **arguments)
    return ImageEncoder(name, model, _timm_features(model), _timm_preprocessing(name, model))


def _timm_features(model: Any) -> Any:
    norm_of_pool = getattr(model, "fc_norm", None)
    if not isinstance(getattr(model, "norm", None), nn.Identity) or isinstance(norm_of_pool, nn.Identity):
        norm_of_pool = None

    def features(images: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        if tokens.ndim == 3:
            tokens = tokens[:, getattr(model, "num_prefix_tokens", 0) :]
        return tokens if norm_of_pool is None else cast(Tensor, norm_of_pool(tokens))

    return features


def _timm_preprocessing(name: str, model: Any) -> Preprocessing:
    config = stock_library("timm.data").resolve_model_data_config(model)
    size = config["input_size"][-1]
    if (patch_embed := getattr(model, "patch_embed", None)) is not None and getattr(patch_embed, "img_size", None):
        height, width = patch_embed.img_size
        if height != width:
            raise EncoderError(f"{name} reads images of {width} x {height} pixels; only square ones are supported")
        size = height
    if config["crop_mode"] not in ("center", "squash"):
        raise EncoderError(f"{name}: crop_mode {config['crop_mode']!r} is not supported; expected center or squash")
    return Preprocessing(
        size=size,
        resize=math.floor(size / config["crop_pct"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=_interpolation(name, config["interpolation"]),
        squash=config["crop_mode"] == "squash",
    )


def open_clip_encoder(name: str, model_name: str, pretrained: str | None, drop_path_rate: float) -> ImageEncoder:
    """Return the image tower of a model of open_clip: its tokens behind ``ln_post``, without the class token.

    Args:
        name: how it is called in tables.
        model_name: name of an architecture, or ``local-dir:FOLDER``.
        pretrained: name of its weights, or a file; None for a folder, which has its own.
        drop_path_rate: see ``load_encoder``.

    Raises:
        EncoderError: the tower is no vision transformer, or its transform is not known here.
    """
    open_clip = stock_library("open_clip")
    if pretrained is not None and not Path(pretrained).is_file():
        known = open_clip.list_pretrained_tags_by_model(model_name)
        if pretrained not in known:
            raise EncoderError(
                f"encoder {name!r}: {pretrained!r} is neither a file nor weights of {model_name} in open_clip; "
                f"known: {', '.join(known) or 'none, and perhaps no such model'}"
            )
    whole = open_clip.create_model(model_name, pretrained=pretrained, require_pretrained=True)
    visual = whole.visual
    config = visual.preprocess_cfg
    preprocessing = _open_clip_preprocessing(name, config)
    if hasattr(visual, "trunk"):
        if drop_path_rate:
            raise EncoderError(f"{name}: open_clip's timm towers take no drop_path_rate here; load it as timm:NAME")
        return ImageEncoder(name, visual.trunk, _timm_features(visual.trunk), preprocessing)
    if not hasattr(visual, "ln_post"):
        raise EncoderError(
            f"{name}: {type(visual).__name__} has no patch tokens; transfer tasks pool over patches: choose a ViT"
        )
    # Behind the residual branches stands a LayerScale, or nothing.
    add_drop_path([[block.ls_1, block.ls_2] for block in visual.transformer.resblocks], drop_path_rate)

    def features(images: Tensor) -> Tensor:
        found = visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        return cast(Tensor, found["image_intermediates"][-1])

    return ImageEncoder(name, visual, features, preprocessing)


def _open_clip_preprocessing(name: str, config: dict[str, Any]) -> Preprocessing:
    height, width = config["size"] if not isinstance(config["size"], int) else (config["size"],) * 2
    mode = config.get("resize_mode") or "shortest"
    if height != width or mode not in ("shortest", "squash"):
        raise EncoderError(
            f"{name} reads {width} x {height} pixels with resize_mode {mode!r}; "
            "only square images with shortest or squash are supported"
        )
    return Preprocessing(
        size=height,
        resize=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=_interpolation(name, config["interpolation"]),
        squash=mode == "squash",
    )


def clip_encoder(name: str, source: str, drop_path_rate: float) -> ImageEncoder:
    """Return the vision tower of a CLIP of transformers: its tokens behind ``post_layernorm``, without the class token.

    Args:
        name: how it is called in tables.
        source: folder, or name on the hub.
        drop_path_rate: see ``load_encoder``.

    Raises:
        EncoderError: weights are missing in the folder, or its transform is not known here.
    """
    transformers = stock_library("transformers")
    model, report = transformers.CLIPVisionModel.from_pretrained(source, output_loading_info=True)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise EncoderError(f"{name}: {len(missing)} weights are missing, e.g. {missing[0]}; export the encoder again")
    tower = getattr(model, "vision_model", model)
    add_drop_path([[layer.self_attn, layer.mlp] for layer in tower.encoder.layers], drop_path_rate)
    # Only the settings are of interest; this class reads them without torchvision.
    processor = transformers.CLIPImageProcessorPil if hasattr(transformers, "CLIPImageProcessorPil") else None
    settings = (processor or transformers.CLIPImageProcessor).from_pretrained(source)
    size, crop = dict(settings.size), dict(settings.crop_size)
    if "shortest_edge" not in size or crop.get("height") != crop.get("width"):
        raise EncoderError(
            f"{name}: size {size} and crop_size {crop} are not supported; expected shortest_edge, square"
        )

    def features(images: Tensor) -> Tensor:
        return cast(Tensor, tower.post_layernorm(model(pixel_values=images).last_hidden_state)[:, 1:])

    filters = {filter_: interpolation for interpolation, filter_ in RESAMPLING.items()}
    preprocessing = Preprocessing(
        size=crop["height"],
        resize=size["shortest_edge"],
        mean=tuple(settings.image_mean),
        std=tuple(settings.image_std),
        interpolation=_interpolation(name, filters.get(settings.resample, str(settings.resample))),
        floor_centre=True,
    )
    return ImageEncoder(name, model, features, preprocessing)


def _interpolation(name: str, interpolation: str) -> Interpolation:
    # timm says "random" of models that were trained with several, and evaluates them with bilinear.
    chosen = "bilinear" if interpolation == "random" else interpolation
    if chosen not in RESAMPLING:
        raise EncoderError(
            f"{name}: interpolation {interpolation!r} is not supported; expected {', '.join(RESAMPLING)}"
        )
    return cast(Interpolation, chosen)
