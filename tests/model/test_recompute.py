"""What the backward pass recomputes. Oracles: the same tower that keeps everything, bit for bit; a count of saved bytes
by hand, layer by layer; torch's counter of operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lcl_megatron.config import DataConfig, LanguageConfig, RunConfig, VisionConfig
from lcl_megatron.model.drop_path import DropPath
from lcl_megatron.model.language import LanguageModel
from lcl_megatron.model.specs import Runtime
from lcl_megatron.model.vision import VisionTower
from tests.batches import make_rows
from tests.model import plain
from tests.model.test_vision import VISION

LANGUAGE = LanguageConfig(
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=40,
    num_attention_heads=3,
    vocab_size=100,
    max_position_embeddings=32,
)
KEYS = torch.arange(5, 11)
TOKENS = VISION.num_tokens
MODES: dict[str, dict[str, Any]] = {
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full"},
    "full, two layers": {"recompute_granularity": "full", "recompute_num_layers": 2},
}
Forward = Callable[[Tensor, int], Tensor]


def _vision(vision: VisionConfig, runtime: Runtime, drop: bool = True) -> tuple[nn.Module, Forward]:
    """Return a tower and what runs its layers on patch features, as in a step."""
    tower = VisionTower(vision, runtime, has_embedding=False, has_final_layernorm=False)
    plain.randomize(tower, seed=3)

    def forward(patches: Tensor, step: int) -> Tensor:
        drop_path = DropPath(vision.drop_path_rate, vision.num_layers, seed=1, step=step) if drop else None
        return tower.encode(patches, KEYS, drop_path)

    return tower, forward


def _language(language: LanguageConfig, runtime: Runtime) -> tuple[nn.Module, Forward]:
    tower = LanguageModel(language, runtime, has_embedding=False, heads_chunk_size=None)
    plain.randomize(tower, seed=3)
    config = RunConfig(vision=VISION, language=language, data=DataConfig(seq_length=32))
    (batch,) = make_rows(config, [[(20, ()), (12, ())]])
    return tower, lambda hidden, step: tower.decode(hidden, batch)


def _from_noise(forward: Forward, rows: int) -> Tensor:
    """Run a tower on what looks like the output of another module: not a leaf, which would live in any case."""
    return forward(torch.randn(rows, 1, 24, requires_grad=True) * 1, 0)


def _saved(tower: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return the output, and the bytes of all storages held for the backward pass, parameters left out."""
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    for parameter in tower.parameters():
        held.pop(parameter.untyped_storage()._cdata, None)
    return output, sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def _two_micro_batches(forward: Forward, tower: nn.Module, tokens: int) -> list[Tensor]:
    """Return outputs and gradients of two micro-batches, both forward before the first goes backward, as in 1F1B."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tokens, 1, 24, generator=generator).requires_grad_() for _ in range(2)]
    direction = torch.randn(tokens, 1, 24, generator=generator)
    outputs = [forward(x * 1, step) for step, x in enumerate(inputs)]
    for output in outputs:
        output.backward(direction)
    gradients = [p.grad for p in (*inputs, *tower.parameters())]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    return [*(output.detach() for output in outputs), *gradients]


def _assert_equal(keeping: tuple[nn.Module, Forward], recomputing: tuple[nn.Module, Forward], tokens: int) -> None:
    """Both towers must give the same bits, outputs and gradients."""
    results = [_two_micro_batches(forward, tower, tokens) for tower, forward in (keeping, recomputing)]
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("drop_path_mode", ["mask", "subset"])
def test_vision_gradients_are_those_of_a_tower_that_keeps_everything(
    drop_path_mode: Any, mode: dict[str, Any], runtime: Runtime
) -> None:
    keeping = dataclasses.replace(VISION, drop_path_mode=drop_path_mode)
    recomputing = dataclasses.replace(keeping, **mode)
    _assert_equal(_vision(keeping, runtime), _vision(recomputing, runtime), len(KEYS) * TOKENS)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_language_gradients_are_those_of_a_tower_that_keeps_everything(
    activation: Any, mode: dict[str, Any], runtime: Runtime
) -> None:
    keeping = dataclasses.replace(LANGUAGE, activation=activation)
    recomputing = dataclasses.replace(keeping, **mode)
    _assert_equal(_language(keeping, runtime), _language(recomputing, runtime), 32)


def _floats_per_token(granularity: str, tower: VisionConfig | LanguageConfig) -> tuple[int, int]:
    """Return what the two branches of a layer keep of each token, counted by hand."""
    c, f, heads = tower.hidden_size, tower.ffn_hidden_size, tower.num_attention_heads
    scaled = isinstance(tower, VisionConfig)
    everything = granularity == "none"
    # Input; query, key, value; output; log of the softmax's denominator. Documents attend one by one on a CPU, so
    # that their outputs are kept alone and side by side.
    attention = c + 3 * c + (1 if scaled else 2) * c + heads
    # Input; input of GELU, or output of ReLU.
    mlp = c + f
    if scaled:
        # Outputs before LayerScale.
        attention, mlp = attention + c, mlp + c
    if everything:
        # Outputs of LayerNorm, mean and deviation.
        attention, mlp = attention + c + 2, mlp + c + 2
    if everything and tower.activation != "relu":
        # Output of GELU.
        mlp += f
    return attention, mlp


@pytest.mark.parametrize("granularity", ["none", "selective"])
def test_vision_keeps_what_a_count_by_hand_says(granularity: Any, runtime: Runtime) -> None:
    vision = dataclasses.replace(VISION, recompute_granularity=granularity)
    tower, forward = _vision(vision, runtime, drop=False)
    rows = len(KEYS) * TOKENS
    _, found = _saved(tower, partial(_from_noise, forward, rows))
    assert found == 4 * rows * 3 * sum(_floats_per_token(granularity, vision))


@pytest.mark.parametrize("granularity", ["none", "selective"])
def test_vision_keeps_only_the_kept_images_of_a_subset(granularity: Any, runtime: Runtime) -> None:
    vision = dataclasses.replace(VISION, drop_path_mode="subset", recompute_granularity=granularity)
    tower, forward = _vision(vision, runtime)
    _, found = _saved(tower, partial(_from_noise, forward, len(KEYS) * TOKENS))
    # Rates 0, 0.3, 0.6 of six images; where some are left out, their places are kept once per branch.
    kept = [6, 4, 2]
    places = 2 * 8 * (kept[1] + kept[2])
    assert found == 4 * TOKENS * sum(kept) * sum(_floats_per_token(granularity, vision)) + places


@pytest.mark.parametrize("granularity", ["none", "selective"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_language_keeps_what_a_count_by_hand_says(activation: Any, granularity: Any, runtime: Runtime) -> None:
    language = dataclasses.replace(LANGUAGE, activation=activation, recompute_granularity=granularity)
    tower, forward = _language(language, runtime)
    _, found = _saved(tower, partial(_from_noise, forward, 32))
    assert found == 4 * 32 * 3 * sum(_floats_per_token(granularity, language))


@pytest.mark.parametrize("base", [VISION, LANGUAGE], ids=["vision", "language"])
def test_full_keeps_the_inputs_of_the_layers_it_counts(base: Any, runtime: Runtime) -> None:
    # Without drop-path, so that all layers are alike.
    build, rows = (partial(_vision, drop=False), len(KEYS) * TOKENS) if base is VISION else (_language, 32)
    layer_input, layer = 4 * rows * 24, 4 * rows * sum(_floats_per_token("none", base))
    for layers in (1, 2, 0):
        tower, forward = build(
            dataclasses.replace(base, recompute_granularity="full", recompute_num_layers=layers), runtime
        )
        _, found = _saved(tower, partial(_from_noise, forward, rows))
        assert found == (layers or 3) * layer_input + (3 - (layers or 3)) * layer


@pytest.mark.parametrize("drop_path_mode", ["mask", "subset"])
def test_each_mode_keeps_less_than_the_one_before(drop_path_mode: Any, runtime: Runtime) -> None:
    sizes = []
    for granularity in ("none", "selective", "full"):
        vision = dataclasses.replace(VISION, drop_path_mode=drop_path_mode, recompute_granularity=granularity)
        tower, forward = _vision(vision, runtime)
        sizes.append(_saved(tower, partial(_from_noise, forward, 60))[1])
    assert sizes[0] > sizes[1] > sizes[2]


def test_only_full_computes_products_again(runtime: Runtime) -> None:
    """One more forward pass in three, or nothing."""
    products = {}
    for granularity in ("none", "selective", "full"):
        _, forward = _vision(dataclasses.replace(VISION, recompute_granularity=granularity), runtime)
        with FlopCounterMode(display=False) as counter:
            _from_noise(forward, 60).sum().backward()
        products[granularity] = counter.get_total_flops()
    assert products["none"] == 3 * 2 * 60 * 3 * (4 * 24 * 24 + 2 * 24 * 40)
    assert products["selective"] == products["none"]
    assert products["full"] == products["none"] * 4 // 3


def test_without_gradients_nothing_is_kept_or_waited_for(runtime: Runtime) -> None:
    """A pass without gradients between forward and backward changes nothing; it leaves nothing behind."""
    for granularity in ("selective", "full"):
        tower, forward = _vision(dataclasses.replace(VISION, recompute_granularity=granularity), runtime)
        x = torch.randn(60, 1, 24, requires_grad=True)
        gradients = []
        for interrupt in (False, True):
            tower.zero_grad()
            output = forward(x * 1, 0)
            if interrupt:
                with torch.no_grad():
                    assert torch.equal(forward(x * 1, 0), output)
            output.sum().backward()
            gradients.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
        assert len(gradients[0]) == len(list(tower.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
