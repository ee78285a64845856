"""The vision tower. Oracle: an independent Vision Transformer in plain torch (strided convolution, explicit attention,
one image at a time) on the same parameters, forward and backward.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lcl_megatron.config import VisionConfig
from lcl_megatron.config.image import BLANK_PIXEL, CLIP_MEAN, CLIP_STD
from lcl_megatron.model.drop_path import DropPath
from lcl_megatron.model.sequence_edge import WholeSequence
from lcl_megatron.model.specs import Runtime
from lcl_megatron.model.vision import VisionTower, normalize_images
from tests.model import plain

VISION = VisionConfig(
    image_size=12,
    patch_size=4,
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=3,
    drop_path_rate=0.6,
)
VARIANTS = {
    "paper": VISION,
    "no class token": dataclasses.replace(VISION, class_token=False),
    "no LayerScale": dataclasses.replace(VISION, layer_scale_init=None),
    "QuickGELU": dataclasses.replace(VISION, activation="quick_gelu"),
    "one layer, one head": dataclasses.replace(VISION, num_layers=1, num_attention_heads=1, layernorm_epsilon=1e-2),
}

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp())}


def _plain_vit(tower: VisionTower, image: Tensor, keep: list[tuple[float, float]]) -> Tensor:
    """Return features (P, C) of one normalised image (3, H, W)."""
    vision, state = tower.vision, plain.state_of(tower)
    eps = vision.layernorm_epsilon
    x = F.conv2d(image[None], state["embedding.weight"], stride=vision.patch_size)[0].flatten(1).T
    if vision.class_token:
        x = torch.cat([state["embedding.class_token"][None], x])
    x = plain.layernorm(state, "embedding.layernorm", x + state["embedding.position_embeddings"], eps)
    activation = ACTIVATIONS[vision.activation]
    for index, layer in enumerate(plain.layer_states(state, vision.num_layers)):
        x = plain.layer(layer, x, vision.num_attention_heads, False, activation, keep[index], eps)
    x = plain.layernorm(state, "final_layernorm", x, eps)
    return x[1:] if vision.class_token else x


def _tower(vision: VisionConfig, runtime: Runtime) -> VisionTower:
    tower = VisionTower(vision, runtime)
    plain.randomize(tower, seed=3)
    return tower


@pytest.mark.parametrize("vision", VARIANTS.values(), ids=VARIANTS)
def test_features_and_gradients_equal_a_plain_vit(
    vision: VisionConfig, runtime: Runtime, generator: torch.Generator
) -> None:
    tower = _tower(vision, runtime)
    images = torch.randn(4, 3, 12, 12, generator=generator)
    found = tower(images)
    expected = torch.stack([_plain_vit(tower, image, [(1.0, 1.0)] * vision.num_layers) for image in images])
    assert found.shape == (4, vision.num_patches, vision.hidden_size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(expected.shape, generator=generator)
    _assert_same_gradients(tower, found, expected, direction)


def test_drop_path_removes_the_branches_of_the_dropped_images_only(
    runtime: Runtime, generator: torch.Generator
) -> None:
    tower = _tower(VISION, runtime)
    images = torch.randn(6, 3, 12, 12, generator=generator)
    keys = torch.tensor([5, 6, 7, 8, 9, 10])
    drop_path = DropPath(VISION.drop_path_rate, VISION.num_layers, seed=1, step=4)
    found = tower.finish(tower.encode(tower.embed(images), keys, drop_path), len(images))
    keep = [[drop_path.keep(keys, layer, branch) for branch in (0, 1)] for layer in range(VISION.num_layers)]
    per_image = [
        [tuple(1.0 if mask is None else float(mask[n]) for mask in masks) for masks in keep] for n in range(len(keys))
    ]
    assert len(set(map(tuple, per_image))) > 3, "the masks of the images should differ"
    expected = torch.stack([_plain_vit(tower, image, k) for image, k in zip(images, per_image, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    _assert_same_gradients(tower, found, expected, torch.randn(expected.shape, generator=generator))


@pytest.mark.parametrize("num_images", [1, 2, 7])
def test_a_subset_runs_the_plain_layers_on_the_kept_images_only(
    num_images: int, runtime: Runtime, generator: torch.Generator
) -> None:
    """Every image on its own, its branches scaled by N / M or left out; one image, also a blank one, keeps all."""
    vision = dataclasses.replace(VISION, drop_path_mode="subset")
    tower = _tower(vision, runtime)
    images, keys = torch.randn(num_images, 3, 12, 12, generator=generator), torch.arange(num_images) + 5
    drop_path = DropPath(vision.drop_path_rate, vision.num_layers, seed=1, step=4)
    found = tower.finish(tower.encode(tower.embed(images), keys, drop_path), num_images)
    # Rates 0, 0.3 and 0.6.
    num_kept = {1: [1, 1, 1], 2: [2, 1, 1], 7: [7, 5, 3]}[num_images]
    factors = torch.ones(num_images, vision.num_layers, 2)
    for layer, kept in enumerate(num_kept):
        for branch in (0, 1):
            images_M = drop_path.subset(keys, layer, branch)
            if kept < num_images:
                assert len(images_M) == kept
                factors[:, layer, branch] = 0.0
                factors[images_M, layer, branch] = num_images / kept
    expected = torch.stack(
        [_plain_vit(tower, image, factor.tolist()) for image, factor in zip(images, factors, strict=True)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    _assert_same_gradients(tower, found, expected, torch.randn(expected.shape, generator=generator))


def test_a_subset_of_a_part_of_the_sequence_is_refused(runtime: Runtime) -> None:
    class HalfSequence(WholeSequence):
        multiple = 2

    tower = _tower(
        dataclasses.replace(VISION, drop_path_mode="subset"), dataclasses.replace(runtime, edge=HalfSequence())
    )
    with pytest.raises(AssertionError, match="whole images cannot be taken from a part of the sequence"):
        tower.encode(torch.zeros(30, 1, 24), torch.arange(6), DropPath(0.6, 3, seed=1, step=4))


def test_two_passes_of_a_step_drop_the_same_subset_and_two_steps_do_not(
    runtime: Runtime, generator: torch.Generator
) -> None:
    tower = _tower(dataclasses.replace(VISION, drop_path_mode="subset"), runtime)
    patches, keys = tower.embed(torch.randn(6, 3, 12, 12, generator=generator)), torch.arange(6)
    first, again, other = (tower.encode(patches, keys, DropPath(0.6, 3, seed=1, step=step)) for step in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_subset_multiplies_matrices_for_the_kept_images_only(runtime: Runtime, generator: torch.Generator) -> None:
    """Forward and backward: rates 0, 0.3, 0.6 of ten images leave 10 + 7 + 4."""
    products = {}
    for mode in ("mask", "subset"):
        tower = _tower(dataclasses.replace(VISION, drop_path_mode=mode), runtime)
        patches = torch.randn(10 * VISION.num_tokens, 1, 24, generator=generator, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            tower.encode(patches, torch.arange(10), DropPath(0.6, 3, seed=1, step=4)).sum().backward()
        products[mode] = counter.get_total_flops()
    assert products["mask"] == 3 * 2 * 30 * VISION.num_tokens * (4 * 24 * 24 + 2 * 24 * 40)
    assert products["subset"] * 30 == products["mask"] * 21


@pytest.mark.parametrize("mode", ["mask", "subset"])
def test_evaluation_drops_nothing(mode: Any, runtime: Runtime, generator: torch.Generator) -> None:
    images = torch.randn(2, 3, 12, 12, generator=generator)
    tower = _tower(dataclasses.replace(VISION, drop_path_mode=mode), runtime)
    without = _tower(dataclasses.replace(VISION, drop_path_rate=0.0), runtime)
    assert torch.equal(tower(images), without(images))


def test_images_do_not_see_each_other(runtime: Runtime, generator: torch.Generator) -> None:
    tower, images = _tower(VISION, runtime), torch.randn(3, 3, 12, 12, generator=generator)
    together = tower(images)
    for index in range(3):
        torch.testing.assert_close(together[index], tower(images[index : index + 1])[0], rtol=1e-5, atol=1e-6)


def test_bytes_are_normalised_as_openclip_does_and_floats_are_left_alone() -> None:
    pixels = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = normalize_images(pixels, torch.float32)
    for channel in range(3):
        expected = (pixels[:, channel].double() / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(normalize_images(found, torch.float32), found)
    assert normalize_images(pixels, torch.bfloat16).dtype == torch.bfloat16


def test_blank_pixel_is_zero_to_within_half_a_step() -> None:
    blank = torch.tensor(BLANK_PIXEL, dtype=torch.uint8).view(1, 3, 1, 1)
    steps = normalize_images(blank, torch.float32).flatten() * torch.tensor(CLIP_STD) * 255
    assert steps.abs().max() <= 0.5


@pytest.mark.parametrize("shape", [(2, 3, 12, 16), (2, 1, 12, 12), (2, 3, 8, 8)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...], runtime: Runtime) -> None:
    with pytest.raises(ValueError, match=r"images of shape \(2, .*\); expected \(N, 3, 12, 12\)"):
        _tower(VISION, runtime)(torch.zeros(shape))


def _assert_same_gradients(tower: VisionTower, found: Tensor, expected: Tensor, direction: Tensor) -> None:
    parameters = dict(tower.named_parameters())
    ours, theirs = (
        dict(zip(parameters, torch.autograd.grad(output, list(parameters.values()), direction), strict=True))
        for output in (found, expected)
    )
    plain.assert_same_gradients(ours, theirs, tolerance=1e-4)
