"""Core attention over packed sequences, all three ways of running it. Oracle: explicit softmax, head by head and
sequence by sequence (``plain.attend_each``), forward and backward.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from lcl_megatron.config import LanguageConfig
from lcl_megatron.model.attention import PackedSequences, TorchCoreAttention, _block_mask
from lcl_megatron.model.specs import Runtime, language_transformer_config
from tests.model import plain

HEADS, WIDTH, ROW = 3, 5, 12
BORDERS = {
    "one sequence": [0, 12],
    "two rows": [0, 12, 24],
    "many": [0, 5, 12, 13, 20, 24, 36],
    "of one token": [0, 1, 2, 12],
}


def _core(runtime: Runtime, causal: bool, scale: float | None = None) -> TorchCoreAttention:
    config = language_transformer_config(LanguageConfig(hidden_size=24, num_attention_heads=3), runtime)
    return TorchCoreAttention(config, 1, AttnMaskType.causal if causal else AttnMaskType.no_mask, softmax_scale=scale)


def _inputs(tokens: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(tokens, HEADS, WIDTH, generator=generator, requires_grad=True) for _ in range(3)]


def _assert_equal(found: Tensor, expected: Tensor, inputs: list[Tensor], generator: torch.Generator) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn(expected.shape, generator=generator)
    for gradient, wanted in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_each_sequence_alone(borders: list[int], causal: bool, runtime: Runtime, generator: torch.Generator) -> None:
    inputs = _inputs(borders[-1], generator)
    sequences = PackedSequences.of(torch.tensor(borders, dtype=torch.int32), 12, row_length=ROW)
    found = _core(runtime, causal)(*inputs, packed_seq_params=sequences)
    _assert_equal(found, plain.attend_each(*inputs, borders, causal), inputs, generator)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_rows_with_a_block_mask(borders: list[int], causal: bool, runtime: Runtime, generator: torch.Generator) -> None:
    """What runs on a GPU; the same calls on the CPU."""
    inputs = _inputs(borders[-1], generator)
    sequences = PackedSequences.of(torch.tensor(borders, dtype=torch.int32), 12, row_length=ROW)
    mask = _block_mask(sequences, borders[-1], torch.device("cpu"), causal)
    assert mask.shape == (borders[-1] // ROW, 1, ROW, ROW)
    found = _core(runtime, causal)._attend_rows(*inputs, ROW, mask).flatten(1)
    _assert_equal(found, plain.attend_each(*inputs, borders, causal), inputs, generator)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_one_sequence_per_row(padding: int, causal: bool, runtime: Runtime, generator: torch.Generator) -> None:
    """Images: rows without a mask, and a few positions of padding behind them, which get zeros."""
    inputs = _inputs(3 * ROW + padding, generator)
    borders = torch.tensor([0, ROW, 2 * ROW, 3 * ROW] + [3 * ROW + padding] * (padding > 0), dtype=torch.int32)
    sequences = PackedSequences.of(borders, ROW, row_length=ROW, one_per_row=True)
    found = _core(runtime, causal)(*inputs, packed_seq_params=sequences)
    expected = plain.attend_each(*inputs, [0, ROW, 2 * ROW, 3 * ROW], causal)
    assert not found[3 * ROW :].any()
    _assert_equal(found[: 3 * ROW], expected, inputs, generator)


def test_softmax_scale_is_applied(runtime: Runtime, generator: torch.Generator) -> None:
    query, key, value = _inputs(12, generator)
    sequences = PackedSequences.of(torch.tensor([0, 7, 12], dtype=torch.int32), 7, row_length=ROW)
    found = _core(runtime, True, scale=0.3)(query, key, value, packed_seq_params=sequences)
    expected = plain.attend_each(query * 0.3 * WIDTH**0.5, key, value, [0, 7, 12], True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_other_masks_are_refused(runtime: Runtime) -> None:
    config = _core(runtime, True).config
    with pytest.raises(ValueError, match=r"AttnMaskType\.padding; expected causal or no_mask"):
        TorchCoreAttention(config, 1, AttnMaskType.padding)
    sequences = PackedSequences.of(torch.tensor([0, 2], dtype=torch.int32), 2, row_length=2)
    x = torch.zeros(2, HEADS, WIDTH)
    with pytest.raises(AssertionError, match="takes its mask from packed_seq_params"):
        _core(runtime, True)(x, x, x, torch.zeros(1), packed_seq_params=sequences)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_gpu_equals_plain(causal: bool, runtime: Runtime, generator: torch.Generator) -> None:
    inputs = _inputs(36, generator)
    borders = BORDERS["many"]
    sequences = PackedSequences.of(torch.tensor(borders, dtype=torch.int32, device="cuda"), 12, row_length=ROW)
    found = _core(runtime, causal)(*(x.cuda() for x in inputs), packed_seq_params=sequences).cpu()
    torch.testing.assert_close(found, plain.attend_each(*inputs, borders, causal), rtol=1e-4, atol=1e-4)
