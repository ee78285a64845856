"""FLOP accounting.

Oracles: torch's own operator counter (``torch.utils.flop_counter``) on a plain torch model of the same shapes,
published forward costs (open_clip's profile of ViT-L/14: 162.03 GF, of ViT-B/16: 35.13 GF), a by-hand budget of
the paper's main case, and vendors' datasheets.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lcl_megatron.config import ConfigError, LanguageConfig, RunConfig, VisionConfig
from lcl_megatron.data.batch import StepLayout
from lcl_megatron.training.flops import (
    device_peak_flops,
    layout_flops,
    model_flops_utilization,
    step_flops,
    vision_forward_flops,
)

VIT_L_14 = VisionConfig(patch_size=14, num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16)
OPT_125M = LanguageConfig(vocab_size=50_272)


class PlainBlock(nn.Module):
    """Transformer block with explicit matrix products, so that the counter sees each of them."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        x = x + self.proj((query @ key.transpose(1, 2)).softmax(-1) @ value)
        return x + self.mlp(x)


class PlainModel(nn.Module):
    """Vision tower, pool, language model and heads in plain torch; one image, one document at a time."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        vision, language = config.vision, config.language
        width, hidden = vision.hidden_size, language.hidden_size
        self.patches = nn.Linear(3 * vision.patch_size**2, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.vision = nn.Sequential(*(PlainBlock(width, vision.ffn_hidden_size) for _ in range(vision.num_layers)))
        self.key, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.query = nn.Parameter(torch.randn(1, 1, hidden))
        self.output = nn.Linear(hidden, hidden, bias=False)
        self.embedding = nn.Embedding(language.vocab_size, hidden)
        layers = (PlainBlock(hidden, language.ffn_hidden_size) for _ in range(language.num_layers))
        self.language = nn.Sequential(*layers)
        self.context_head = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, language.vocab_size, bias=False)

    def forward(self, pixels: Tensor, document: Tensor, num_targets: int) -> Tensor:
        """Run ``pixels`` (N, P, 3 p^2) and one document (S,) of token ids; image latents replace its first tokens."""
        features = torch.cat([self.class_token.expand(len(pixels), -1, -1), self.patches(pixels)], dim=1)
        features = self.vision(features)[:, 1:]
        keys, values = self.key(features), self.value(features)
        latents = self.output(values)
        query = self.query.expand(len(pixels), -1, -1)
        pooled = self.output((query @ keys.transpose(1, 2)).softmax(-1) @ values)
        hidden = self.embedding(document)
        hidden = torch.cat([latents.reshape(-1, latents.shape[-1]), hidden[latents.shape[0] * latents.shape[1] :]])
        hidden = self.language(hidden[None])[0]
        contexts = self.context_head(hidden[: len(pixels)])
        return self.head(hidden[-num_targets:]).square().sum() + (pooled[:, 0] * contexts).sum()


def test_step_flops_equal_torchs_operator_count_up_to_the_causal_half() -> None:
    config = RunConfig(
        vision=VisionConfig(
            image_size=64, patch_size=8, num_layers=3, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4
        ),
        language=LanguageConfig(
            num_layers=2, hidden_size=96, ffn_hidden_size=384, num_attention_heads=4, vocab_size=500
        ),
    )
    num_images, length, num_targets = 2, 300, 150
    model = PlainModel(config)
    pixels = torch.randn(num_images, config.vision.num_patches, 3 * config.vision.patch_size**2)
    document = torch.randint(500, (length,))

    with FlopCounterMode(display=False) as counter:
        model(pixels, document, num_targets).backward()
    # Torch multiplies the whole score matrix; useful work is its lower half: forward 4 S^2 H, three times.
    upper_half = 3 * config.language.num_layers * 4 * length**2 * config.language.hidden_size / 2
    expected = counter.get_total_flops() - upper_half

    assert upper_half > 0.02 * expected  # the half is visible at the tolerance below
    assert step_flops(config, num_images, [length], num_targets) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("vision", "published_gflops"), [(VIT_L_14, 162.03), (VisionConfig(), 35.13)])
def test_vision_forward_flops_equal_published_profile(vision: VisionConfig, published_gflops: float) -> None:
    assert vision_forward_flops(vision) / 1e9 == pytest.approx(published_gflops, rel=0.005)


def test_step_flops_of_the_papers_main_case_are_4_33_tflops() -> None:
    """Six images of ViT-L/14 and 500 text tokens in one document of 2,048 tokens, OPT-125M."""
    config = RunConfig(vision=VIT_L_14, language=OPT_125M)
    num_targets = 2048 - 6 * 258
    flops = step_flops(config, 6, [2048], num_targets)
    assert flops / 1e12 == pytest.approx(4.33, rel=0.005)
    assert flops / 3e9 == pytest.approx(1443, rel=0.005)


def test_regressed_latents_pass_the_context_head_once_more_each() -> None:
    config = RunConfig(language=OPT_125M)
    regression = dataclasses.replace(config.loss, latent_regression_loss_weight=1.0)
    with_regression = step_flops(dataclasses.replace(config, loss=regression), 5, [2048], 300)
    assert with_regression - step_flops(config, 5, [2048], 300) == pytest.approx(3 * 5 * 196 * 2 * 768**2)


def test_step_flops_are_additive_and_attention_stays_within_documents() -> None:
    config = RunConfig(vision=VIT_L_14, language=OPT_125M)
    whole = step_flops(config, 3, [700, 300, 1048], 900)
    parts = step_flops(config, 1, [700], 400) + step_flops(config, 2, [300, 1048], 500)
    assert whole == pytest.approx(parts, rel=1e-12)

    one_document = step_flops(config, 0, [2048], 0)
    two_documents = step_flops(config, 0, [1024, 1024], 0)
    attention_of_one = 3 * 12 * 4 * 2048**2 * 768 / 2
    assert one_document - two_documents == pytest.approx(attention_of_one / 2, rel=1e-9)


def test_layout_flops_equal_step_flops_of_the_same_documents() -> None:
    config = RunConfig(vision=VIT_L_14, language=OPT_125M)
    lengths = [700, 300, 1048]
    layout = StepLayout(
        num_images=np.array([[1, 0], [2, 3]]),
        has_context=np.ones(6, dtype=bool),
        num_targets=900,
        num_tokens=sum(lengths),
        sum_squared_lengths=sum(length**2 for length in lengths),
    )
    assert layout_flops(config, layout) == pytest.approx(step_flops(config, 6, lengths, 900), rel=1e-12)


def test_step_flops_without_class_token_cost_less() -> None:
    config = RunConfig(vision=VIT_L_14, language=OPT_125M)
    without = dataclasses.replace(config, vision=dataclasses.replace(VIT_L_14, class_token=False))
    ratio = step_flops(without, 1, [], 0) / step_flops(config, 1, [], 0)
    assert ratio == pytest.approx(256 / 257, abs=1e-3)


def test_step_flops_with_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size = 0"):
        step_flops(RunConfig(), 1, [100], 10)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_device_peak_flops_of_known_devices_follow_datasheets(name: str, precision: str, tflops: float) -> None:
    peak = device_peak_flops(name, "fp32" if precision == "fp32" else "bf16")
    assert peak == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", ["cpu", "", "AMD EPYC 9575F", "NVIDIA A100-SXM4-40GB MIG 3g.20gb", "NVIDIA H9000"])
def test_device_peak_flops_of_unknown_devices_is_none_and_utilization_too(name: str) -> None:
    peak = device_peak_flops(name, "bf16")
    assert peak is None
    assert model_flops_utilization(1e12, 1.0, 1, peak) is None


def test_model_flops_utilization_divides_by_all_devices() -> None:
    assert model_flops_utilization(8e12, 2.0, 4, 10e12) == pytest.approx(0.1)


def test_branches_that_a_subset_leaves_out_do_not_count() -> None:
    """Rates 0, 0.1 ... 0.4: four layers of five; the patch embedding is not part of it."""
    mask = VisionConfig(num_layers=5, drop_path_rate=0.4)
    without_layers = 2 * mask.num_patches * mask.hidden_size * 3 * mask.patch_size**2
    subset = vision_forward_flops(dataclasses.replace(mask, drop_path_mode="subset"))
    assert subset - without_layers == pytest.approx(0.8 * (vision_forward_flops(mask) - without_layers))
    assert vision_forward_flops(mask) == vision_forward_flops(dataclasses.replace(mask, drop_path_rate=0.0))
