"""Oracle: the numbers of the paper (arXiv 2406.07543, section 4.1 and appendix) and of the released code, by hand."""

from __future__ import annotations

import pytest

from lcl_megatron.config import RunConfig
from lcl_megatron.config.sources import load_run_config, preset_names
from lcl_megatron.config.validate import validate

PROCESSES = {"tiny": 1, "vit_b16_opt125m": 8, "vit_l14_opt125m": 64, "official_b16": 64, "official_b32": 8}


def load(name: str) -> RunConfig:
    return load_run_config(["--preset", name])


def test_known_presets() -> None:
    assert preset_names() == sorted(PROCESSES)


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_preset_can_run_on_the_hardware_its_header_names(name: str) -> None:
    validate(load(name), PROCESSES[name])


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "latents"),
    [
        ("vit_b16_opt125m", 12, 768, 12, 196),
        ("vit_l14_opt125m", 24, 1024, 16, 256),
        ("official_b16", 12, 768, 12, 196),
        ("official_b32", 12, 768, 12, 49),
        ("tiny", 3, 64, 4, 36),
    ],
)
def test_vision_tower(name: str, layers: int, width: int, heads: int, latents: int) -> None:
    vision = load(name).vision
    assert (vision.num_layers, vision.hidden_size, vision.num_attention_heads) == (layers, width, heads)
    assert (vision.num_patches, vision.ffn_hidden_size) == (latents, 4 * width)


@pytest.mark.parametrize(("name", "steps"), [("vit_b16_opt125m", 250_000), ("vit_l14_opt125m", 200_000)])
def test_paper_recipe(name: str, steps: int) -> None:
    config = load(name)
    language = config.language
    assert (language.num_layers, language.hidden_size, language.num_attention_heads) == (12, 768, 12)
    assert (language.activation, language.tie_embeddings, language.context_bias) == ("relu", True, True)
    assert (config.vision.drop_path_rate, config.data.context_rule) == (0.2, "content")
    assert config.vision.layer_scale_init is not None
    assert (config.data.seq_length, config.data.min_similarity, config.data.max_images_per_document) == (2048, 0.24, 6)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.lr_warmup_iters) == (3e-4, 0.1, 2000)
    assert (config.training.train_iters, config.training.precision) == (steps, "bf16")
    assert config.loss.contrastive_loss_weight == 0.1


@pytest.mark.parametrize(
    ("name", "width", "pool_heads", "context", "lr"),
    [("official_b16", 768, 12, 280, 5e-4), ("official_b32", 512, 8, 2048, 3e-4)],
)
def test_official_recipe(name: str, width: int, pool_heads: int, context: int, lr: float) -> None:
    config = load(name)
    language, optimizer = config.language, config.optimizer
    assert (language.hidden_size, language.ffn_hidden_size, language.num_attention_heads) == (
        width,
        4 * width,
        pool_heads,
    )
    assert (language.activation, language.tie_embeddings, language.context_bias) == ("gelu", False, False)
    assert (language.vocab_size, language.max_position_embeddings, config.data.seq_length) == (49411, context, context)
    assert (config.vision.layer_scale_init, config.vision.drop_path_rate, config.vision.class_token) == (None, 0, True)
    assert (config.pool.num_attention_heads, config.data.context_rule) == (pool_heads, "index")
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == (lr, 0.2, 0)
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.98, 1e-6)
