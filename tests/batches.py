"""Hand-made micro-batches for tests of the model and of its layouts: random tokens and pixels, chosen documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lcl_megatron.config import RunConfig
from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.batch import PackedBatch, StepLayout

Document = tuple[int, tuple[int, ...]]
"""Length in tokens, and the positions of ``<BoI>`` in it."""


def make_rows(config: RunConfig, rows: Sequence[Sequence[Document]], seed: int = 0) -> list[PackedBatch]:
    """Return one micro-batch per row; ``merge`` joins them. A row's content depends on its index and the seed only.

    Some images, and some contexts, are said to be the same; they are not.
    """
    return [_make_row(config, documents, seed * 1000 + index) for index, documents in enumerate(rows)]


def _make_row(config: RunConfig, documents: Sequence[Document], seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    length, latents, size = config.data.seq_length, config.vision.num_patches, config.vision.image_size
    tokens = torch.randint(10, config.language.vocab_size, (length,), generator=generator)
    position_ids, loss_mask = torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool)
    borders, slots, has_context = [0], [], []
    for document_length, boi_positions in documents:
        begin = borders[-1]
        position_ids[begin : begin + document_length] = torch.arange(document_length)
        loss_mask[begin : begin + document_length - 1] = True
        for boi in boi_positions:
            slots.append(begin + boi + 1)
            has_context.append(boi > 0)
            # From <BoI> on, the next tokens are placeholders and <EoI>.
            loss_mask[begin + boi : begin + boi + latents + 1] = False
        borders.append(begin + document_length)
    if borders[-1] < length:
        position_ids[borders[-1] :] = torch.arange(length - borders[-1])
        borders.append(length)
    labels = torch.where(loss_mask, tokens.roll(-1), 0)
    count = len(slots)
    images = torch.randint(0, 256, (max(1, count), 3, size, size), generator=generator).to(torch.uint8)
    if count == 0:
        images[:] = torch.tensor(BLANK_PIXEL, dtype=torch.uint8)[:, None, None]
    blank = [0] * (count == 0)
    return PackedBatch(
        tokens=tokens[None],
        labels=labels[None],
        loss_mask=loss_mask[None],
        position_ids=position_ids[None],
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=int(np.diff(borders).max()),
        label_positions=loss_mask.nonzero()[:, 0],
        image_slots=torch.tensor(slots, dtype=torch.int64),
        context_slots=torch.tensor([s - 1 for s in slots] + blank),
        has_context=torch.tensor(has_context + [False] * len(blank)),
        image_keys=torch.arange(max(1, count)) + 100 * seed + 1,
        image_ok=torch.tensor([True] * count + [False] * len(blank)),
        images=images,
        num_images=count,
        image_hashes=(torch.arange(max(1, count)) + seed) % 5,
        context_hashes=torch.tensor([boi % 4 for _, positions in documents for boi in positions] + blank),
    )


def merge(rows: Sequence[PackedBatch]) -> PackedBatch:
    """Return one micro-batch of several rows; blank image slots vanish as soon as one row has an image."""
    length = rows[0].tokens.shape[1]
    count = sum(row.num_images for row in rows)
    imaged = [(i, row) for i, row in enumerate(rows) if row.num_images] or [(0, rows[0])]
    borders = [0]
    for i, row in enumerate(rows):
        borders += (row.cu_seqlens[1:] + i * length).tolist()
    hashes = {name: torch.cat([getattr(row, name) for _, row in imaged]) for name in ("image_hashes", "context_hashes")}
    return PackedBatch(
        tokens=torch.cat([row.tokens for row in rows]),
        labels=torch.cat([row.labels for row in rows]),
        loss_mask=torch.cat([row.loss_mask for row in rows]),
        position_ids=torch.cat([row.position_ids for row in rows]),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(row.max_seqlen for row in rows),
        label_positions=torch.cat([row.label_positions + i * length for i, row in enumerate(rows)]),
        image_slots=torch.cat([row.image_slots + i * length for i, row in enumerate(rows)]),
        context_slots=torch.cat([row.context_slots + (i * length if count else 0) for i, row in imaged]),
        has_context=torch.cat([row.has_context for _, row in imaged]),
        image_keys=torch.cat([row.image_keys for _, row in imaged]),
        image_ok=torch.cat([row.image_ok for _, row in imaged]),
        images=torch.cat([row.images for _, row in imaged]),
        num_images=count,
        **hashes,
    )


def layout_of(micro_batches: Sequence[Sequence[PackedBatch]]) -> StepLayout:
    """Return the counts of a global batch given as [micro-batch][data-parallel rank]."""
    flat = [batch for ranks in micro_batches for batch in ranks]
    return StepLayout(
        num_images=np.array([[batch.num_images for batch in ranks] for ranks in micro_batches]),
        has_context=np.concatenate([batch.has_context[: batch.num_images].numpy() for batch in flat]),
        num_targets=sum(len(batch.label_positions) for batch in flat),
        num_tokens=sum(batch.tokens.numel() for batch in flat),
        sum_squared_lengths=sum(int((batch.cu_seqlens.diff() ** 2).sum()) for batch in flat),
    )
