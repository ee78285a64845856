"""Vision towers of transformers' CLIP, OpenAI's among them, as our tower."""

from __future__ import annotations

from torch import Tensor

from lcl_megatron.checkpoint.convert import clip_vision
from lcl_megatron.checkpoint.convert.stock_tower import StockTower, activation_name, layernorm_epsilon
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.refused_pickles import what_failed
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.config import RunConfig, VisionConfig


def load_clip(name: str) -> StockTower:
    """Load the vision tower of a ``CLIPModel`` or a ``CLIPVisionModel``.

    Args:
        name: a local folder with ``config.json``, or a name on the hub.

    Raises:
        CheckpointError: it cannot be loaded, lacks weights, or our tower cannot hold it exactly.
        LibraryError: transformers is not installed.
    """
    transformers = stock_library("transformers")
    source = f"clip:{name}"
    try:
        model, info = transformers.CLIPVisionModel.from_pretrained(name, output_loading_info=True)
    # What hub, file or name may be wrong raises nearly anything.
    except Exception as error:
        raise CheckpointError(
            f"{source} cannot be loaded: {what_failed(error)}; give a folder or a hub name of a CLIPModel or "
            "CLIPVisionModel"
        ) from error
    # Other architectures load too, with random weights where names differ.
    if lacking := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{source} lacks {len(lacking)} weights of CLIP's vision tower, among them {lacking[0]}; "
            "it is no CLIP model"
        )
    config = model.config
    model = model.eval().float()
    # transformers 4 keeps the tower one level down.
    tower = getattr(model, "vision_model", model)
    vision = VisionConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        class_token=True,
        layer_scale_init=None,
        drop_path_rate=0.0,
        layernorm_epsilon=layernorm_epsilon(tower),
        activation=activation_name(tower.encoder.layers[0].mlp.activation_fn),
    )

    def features(images: Tensor) -> Tensor:
        tokens: Tensor = tower.post_layernorm(model(pixel_values=images).last_hidden_state)
        return tokens[:, 1:]

    state = {f"vision_model.{name}": value.detach() for name, value in tower.named_parameters()}
    return StockTower("clip", vision, clip_vision.table(RunConfig(vision=vision)), state, features)
