"""Rows to tensors: one micro-batch of planned rows as a ``PackedBatch``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.data.planning.compose import ComposedDocuments
from lcl_megatron.data.slot_hashes import EMPTY_CONTEXT, context_hashes, image_hashes

if TYPE_CHECKING:
    from lcl_megatron.data.planning.mixture import RowSequence
    from lcl_megatron.data.planning.rows import PlannedRow

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
    """(num_images,) int64, the run's numbers of the images (see ``RowSequence.image_bytes``)."""


def image_key(images: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """Return the key of images in an epoch: positive, and different for every (image, epoch).

    Args:
        images: (k,) int64, number of the image in the run, below 2**40 - 1.
        epochs: (k,) int64, below 2**23.

    Returns:
        (k,) int64.
    """
    return (epochs.astype(np.int64) << IMAGE_BITS) + images + 1


def collate_rows(sequence: RowSequence, rows: Sequence[PlannedRow]) -> CollatedRows:
    """Read the tokens of a micro-batch's rows and lay them out (see ``PackedBatch`` for every tensor).

    Documents follow each other from the row's begin; what is left is one more document, of padding. A micro-batch
    without images has one blank slot, so that the encoder takes part in every backward pass.

    Args:
        sequence: The rows of the run; composes and reads the documents.
        rows: The B rows.

    Raises:
        ValueError: If a row's documents are longer than the row.
        CorpusError: If the corpus is damaged.
    """
    seq_length = sequence.config.seq_length
    content = _compose(sequence, rows)
    composed = content.composed
    starts, borders = _place(composed.lengths, content.row_of, len(rows), seq_length)

    special = sequence.special_tokens
    tokens = np.full(len(rows) * seq_length, special.pad, dtype=np.int64)
    for start, piece in zip(starts.tolist(), content.tokens, strict=True):
        tokens[start : start + len(piece)] = piece
    targets = np.append(tokens[1:], special.pad)
    loss_mask = (targets != special.pad) & (targets != special.image) & (targets != special.eoi)
    loss_mask[borders[1:] - 1] = False  # the next token is another document's
    position_ids = np.arange(len(tokens)) - np.repeat(borders[:-1], np.diff(borders))

    owner = np.repeat(np.arange(len(starts)), composed.num_images)
    context_slots = starts[owner] + composed.image_positions
    keys = image_key(composed.images, composed.epochs[owner])
    files = sequence.image_file_hashes(composed.images)
    contexts = context_hashes(tokens, position_ids, context_slots, files, special)
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
        image_hashes=torch.from_numpy(np.zeros(1, dtype=np.int64) if is_blank else image_hashes(files)),
        context_hashes=torch.from_numpy(np.full(1, EMPTY_CONTEXT, dtype=np.int64) if is_blank else contexts),
    )
    return CollatedRows(batch, composed.images)


@dataclass(frozen=True)
class _Content:
    """What some rows hold, document by document. n documents."""

    composed: ComposedDocuments
    """The documents, row after row, with the run's numbers of images."""
    row_of: np.ndarray
    """(n,) int64, row of each document; ascending."""
    tokens: list[np.ndarray]
    """Tokens of each document."""


def _compose(sequence: RowSequence, rows: Sequence[PlannedRow]) -> _Content:
    """Compose the rows of every corpus together, and put them back into order."""
    parts, tokens, row_of = [], [], []
    for source in sorted({row.source for row in rows}):
        numbers = [number for number, row in enumerate(rows) if row.source == source]
        own = [rows[number] for number in numbers]
        composer = sequence.sources[source].composer
        counts = [len(row.documents) for row in own]
        documents = np.concatenate([row.documents for row in own])
        whole = composer.compose(documents, np.repeat([row.epoch for row in own], counts))
        begins = _joined(own, "begins")
        shown = whole.part(begins, _joined(own, "ends"), composer.num_latents)
        if begins is None:
            begins = np.zeros(len(documents), dtype=np.int64)
        for index, (begin, length) in enumerate(zip(begins.tolist(), shown.lengths.tolist(), strict=True)):
            tokens.append(composer.tokens(whole, index)[begin : begin + length])
        parts.append(dataclasses.replace(shown, images=shown.images + int(sequence.image_begins[source])))
        row_of.append(np.repeat(numbers, counts))
    all_rows = np.concatenate(row_of)
    order = np.argsort(all_rows, kind="stable")
    return _Content(ComposedDocuments.join(parts, order), all_rows[order], [tokens[i] for i in order])


def _joined(rows: Sequence[PlannedRow], name: str) -> np.ndarray | None:
    """Return an array of all rows; None if the rows hold whole documents."""
    parts = [getattr(row, name) for row in rows]
    return None if parts[0] is None else np.concatenate(parts)


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
