"""Oracles: the shapes and rules that ``PackedBatch`` and ``StepLayout`` document, on hand-made values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.batch import PackedBatch, StepLayout


def make_batch(images: torch.Tensor | None, num_images: int = 2) -> PackedBatch:
    slots = max(1, num_images)
    return PackedBatch(
        tokens=torch.zeros(1, 8, dtype=torch.int64),
        labels=torch.zeros(1, 8, dtype=torch.int64),
        loss_mask=torch.zeros(1, 8, dtype=torch.bool),
        position_ids=torch.arange(8)[None],
        cu_seqlens=torch.tensor([0, 8], dtype=torch.int32),
        max_seqlen=8,
        label_positions=torch.zeros(0, dtype=torch.int64),
        image_slots=torch.arange(num_images),
        context_slots=torch.zeros(slots, dtype=torch.int64),
        has_context=torch.tensor([True, True][:slots]),
        image_keys=torch.arange(slots),
        image_ok=torch.tensor([True, False][:slots]),
        images=images,
        num_images=num_images,
    )


def test_pairs_are_good_images_with_context() -> None:
    batch = make_batch(None)
    assert batch.pair_mask.tolist() == [True, False]
    assert dataclasses.replace(batch, has_context=torch.tensor([False, True])).pair_mask.tolist() == [False, False]


def test_there_is_always_an_image_slot() -> None:
    assert [make_batch(None, n).num_image_slots for n in (0, 1, 2)] == [1, 1, 2]


@pytest.mark.parametrize(("dtype", "blank"), [(torch.uint8, BLANK_PIXEL), (torch.float32, (0, 0, 0))])
def test_images_that_another_rank_could_not_decode_become_blank(dtype: torch.dtype, blank: tuple[int, ...]) -> None:
    images = torch.arange(2 * 3 * 4).reshape(2, 3, 2, 2).to(dtype)
    batch = make_batch(images).with_image_ok(torch.tensor([False, True]))
    assert batch.image_ok.tolist() == [False, True]
    assert batch.images is not None
    assert batch.images.dtype == dtype
    assert batch.images[0, :, 1, 0].tolist() == list(blank)
    assert torch.equal(batch.images[1], images[1])
    assert make_batch(None).with_image_ok(torch.tensor([False, True])).images is None


def test_moving_a_batch_moves_every_tensor() -> None:
    moved = make_batch(torch.zeros(2, 3, 2, 2)).to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 12
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.max_seqlen == 8


def test_image_ranges_cover_all_images_in_order() -> None:
    num_images = np.array([[2, 0, 3], [1, 4, 0]])
    layout = StepLayout(num_images, np.zeros(10, dtype=bool), num_targets=5, num_tokens=9, sum_squared_lengths=81)
    found = [layout.image_range(m, r) for m in range(2) for r in range(3)]
    assert found == [(0, 2), (2, 2), (2, 5), (5, 6), (6, 10), (10, 10)]
