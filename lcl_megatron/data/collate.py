"""Rows to tensors: one micro-batch of planned rows as a ``PackedBatch``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.data.compose import Composer
from lcl_megatron.data.rows import PlannedRow

IMAGE_BITS = 40
"""Bits of an image key that hold the image's index; the epoch is above them."""
BLANK_KEY = 0
"""Key of a blank slot; no image has it."""


@dataclass(frozen=True)
class CollatedRows:
    """A micro-batch whose images have not been read."""

    batch: PackedBatch
    """The micro-batch, ``images`` None, every real image taken for good."""
    images: np.ndarray
    """(num_images,) int64, the images' indices in the corpus."""


def image_key(images: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Return the key of images in an epoch: positive, and different for every (image, epoch).

    Args:
        images: (k,) int64, index in the corpus, below 2**40 - 1.
        epochs: (k,) int64, below 2**23.

    Returns:
        (k,) int64.
    """
    return (epochs.astype(np.int64) << IMAGE_BITS) + images + 1


def collate_rows(composer: Composer, rows: Sequence[PlannedRow]) -> CollatedRows:
    """Read the tokens of a micro-batch's rows and lay them out (see ``PackedBatch`` for every tensor).

    Documents follow each other from the row's begin; what is left is one more document, of padding. A micro-batch
    without images has one blank slot, so that the encoder takes part in every backward pass.

    Args:
        composer: Composes and reads the documents.
        rows: The B rows.

    Raises:
        ValueError: If a row's documents are longer than the row.
        CorpusError: If the corpus is damaged.
    """
    seq_length = composer.config.seq_length
    counts = [len(row.documents) for row in rows]
    documents = np.concatenate([row.documents for row in rows])
    composed = composer.compose(documents, np.repeat([row.epoch for row in rows], counts))
    row_of = np.repeat(np.arange(len(rows)), counts)
    starts, borders = _place(composed.lengths, row_of, len(rows), seq_length)

    special = composer.corpus.special_tokens
    tokens = np.full(len(rows) * seq_length, special.pad, dtype=np.int64)
    for index, start in enumerate(starts):
        tokens[start : start + composed.lengths[index]] = composer.tokens(composed, index)
    targets = np.append(tokens[1:], special.pad)
    loss_mask = (targets != special.pad) & (targets != special.image) & (targets != special.eoi)
    loss_mask[borders[1:] - 1] = False  # the next token is another document's
    position_ids = np.arange(len(tokens)) - np.repeat(borders[:-1], np.diff(borders))

    owner = np.repeat(np.arange(len(documents)), composed.num_images)
    context_slots = starts[owner] + composed.image_positions
    keys = image_key(composed.images, composed.epochs[owner])
    is_blank = len(keys) == 0
    batch = PackedBatch(
        tokens=_rows(tokens, len(rows)),
        labels=_rows(np.where(loss_mask, targets, 0), len(rows)),
        loss_mask=_rows(loss_mask, len(rows)),
        position_ids=_rows(position_ids, len(rows)),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        max_seqlen=int(np.diff(borders).max()),
        label_positions=torch.from_numpy(np.flatnonzero(loss_mask)),
        image_slots=torch.from_numpy(context_slots + 1),
        context_slots=torch.from_numpy(np.zeros(1, dtype=np.int64) if is_blank else context_slots),
        has_context=torch.from_numpy(np.zeros(1, dtype=bool) if is_blank else composed.has_context),
        image_keys=torch.from_numpy(np.full(1, BLANK_KEY, dtype=np.int64) if is_blank else keys),
        image_ok=torch.full((max(1, len(keys)),), not is_blank),
        images=None,
        num_images=len(keys),
    )
    return CollatedRows(batch, composed.images)


def _place(lengths: np.ndarray, row_of: np.ndarray, num_rows: int, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat position of every document's begin, and all borders with those of the padding."""
    used = np.bincount(row_of, weights=lengths, minlength=num_rows).astype(np.int64)
    if used.max() > seq_length:
        raise ValueError(f"row {used.argmax()} of the micro-batch has {used.max()} tokens; it holds {seq_length}")
    before = np.cumsum(lengths) - lengths
    before_row = np.cumsum(used) - used
    row_begins = np.arange(num_rows) * seq_length
    starts = row_begins[row_of] + before - before_row[row_of]
    return starts, np.unique(np.concatenate([starts, row_begins + used, row_begins, [num_rows * seq_length]]))


def _rows(values: np.ndarray, num_rows: int) -> torch.Tensor:
    return torch.from_numpy(values).reshape(num_rows, -1)
