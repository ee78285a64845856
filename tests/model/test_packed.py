"""Packed equals unpacked. Oracle: the same documents, one in each row, through the real corpus, plan and loader.

All documents stand in one micro-batch either way, so that the contrast has the same pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from lcl_megatron.config import RunConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.decoding.image_decoder import CpuDecoder
from lcl_megatron.data.decoding.images import TrainingTransform
from lcl_megatron.data.loader import StepLoader, add_images
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.planning.rows import PlannedRow
from lcl_megatron.model.lcl import LCLModel, LCLOutput
from lcl_megatron.parallel.contrastive import PairSlots, contrastive_loss
from tests.data.corpora import WrittenCorpus, random_documents, write
from tests.model import plain

ROWS = 4
STEP = 5
TOLERANCE = 1e-5
"""Norm of the difference relative to the norm, fp32."""
ZERO_GRADIENTS = {"pool.key_projection.bias", "pool.key_layernorm.bias"}
"""Shifting all keys alike does not change a softmax: these gradients are zero but for rounding."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    return write(tmp_path_factory.mktemp("corpus"), random_documents(40, seed=11, with_pixels=True))


@pytest.fixture
def config(tiny_run: RunConfig, written: WrittenCorpus) -> RunConfig:
    return dataclasses.replace(
        tiny_run,
        vision=dataclasses.replace(tiny_run.vision, num_layers=3, drop_path_rate=0.5),
        language=dataclasses.replace(
            tiny_run.language, vocab_size=written.corpus.vocab_size, max_position_embeddings=256
        ),
        loss=dataclasses.replace(tiny_run.loss, contrastive_loss_weight=1.0, cross_entropy_chunk_size=64),
        data=dataclasses.replace(tiny_run.data, seq_length=256),
    )


@pytest.fixture
def batches(config: RunConfig, written: WrittenCorpus) -> tuple[PackedBatch, PackedBatch]:
    """The first step of a run, and its documents one per row in the same order."""
    latents = config.vision.num_patches
    plan = Plan([written.corpus], config.data, latents, ROWS, ROWS, 1, seed=config.training.seed)
    loader: Iterator = iter(StepLoader(plan, 0, config.vision.image_size, end_step=1))
    (packed,) = next(loader).micro_batches
    ((*rows,),) = plan.step(0).micro_batches(0)
    alone = [PlannedRow(0, row.epoch, row.documents[i : i + 1]) for row in rows for i in range(len(row.documents))]
    transform = TrainingTransform(
        size=config.vision.image_size,
        seed=config.training.seed,
        crop_scale=config.data.crop_scale,
        crop_ratio=config.data.crop_ratio,
        max_pixels=config.data.max_image_pixels,
    )
    unpacked, bad = add_images(collate_rows(plan.sequence, alone), plan.sequence, CpuDecoder(transform))
    assert bad == []
    return packed, unpacked


def _losses(output: LCLOutput, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    contrast = contrastive_loss(
        output.pooled_ND,
        output.context_ND,
        output.logit_scale,
        PairSlots([batch.num_image_slots], batch.pair_mask),
        None,
        tile_size=3,
    )
    return output.token_losses_K.mean(), contrast.loss_sum / batch.pair_mask.sum()


def test_rows_are_packed_and_hold_the_same_images(batches: tuple[PackedBatch, PackedBatch]) -> None:
    """Otherwise there would be nothing to compare."""
    packed, unpacked = batches
    assert len(packed.tokens) == ROWS
    assert len(unpacked.tokens) > 2 * ROWS
    assert packed.num_images > 10
    assert 4 < int(packed.pair_mask.sum()) == int(unpacked.pair_mask.sum())
    assert torch.equal(packed.image_keys, unpacked.image_keys)
    assert torch.equal(packed.images, unpacked.images)
    text = packed.tokens.flatten()[packed.label_positions + 1]
    assert torch.equal(text, unpacked.tokens.flatten()[unpacked.label_positions + 1])


def test_losses_and_gradients_of_packed_rows_equal_those_of_single_documents(
    batches: tuple[PackedBatch, PackedBatch], config: RunConfig, build_model: Callable[[RunConfig], LCLModel]
) -> None:
    results = []
    for batch in batches:
        model = build_model(config).train()
        output = model(batch, step=STEP)
        generation, contrastive = _losses(output, batch)
        (generation + config.loss.contrastive_loss_weight * contrastive).backward()
        results.append((output, generation, contrastive, plain.gradients(model)))
    (packed, *losses, gradients), (alone, *expected_losses, expected) = results
    torch.testing.assert_close(packed.token_losses_K, alone.token_losses_K, rtol=1e-4, atol=1e-5)
    for loss, expected_loss in zip(losses, expected_losses, strict=True):
        assert loss.item() == pytest.approx(expected_loss.item(), rel=TOLERANCE)
    # Positions behind the longest document have no gradient in either.
    gradients, expected = ({n: g for n, g in x.items() if n not in ZERO_GRADIENTS} for x in (gradients, expected))
    plain.assert_same_gradients(gradients, expected, TOLERANCE)


def test_drop_path_was_on(
    batches: tuple[PackedBatch, PackedBatch], config: RunConfig, build_model: Callable[[RunConfig], LCLModel]
) -> None:
    model = build_model(config).train()
    with torch.no_grad():
        now, later = (model(batches[0], step=step).pooled_ND for step in (STEP, STEP + 1))
    assert not torch.allclose(now, later, rtol=1e-2)
