"""Oracles: a slow loop over the tokens of each document; documents one per row against the same documents packed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from lcl_megatron.config import DataConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.data.collate import BLANK_KEY, collate_rows, image_key
from lcl_megatron.data.document import Source
from lcl_megatron.data.planning.mixture import RowSequence
from lcl_megatron.data.planning.rows import PlannedRow
from lcl_megatron.data.storage.corpus_part import EncodedDocument
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, write

CONFIG = DataConfig(seq_length=96, max_images_per_document=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    return write(tmp_path_factory.mktemp("collate"), random_documents(150, 4))


def sequence_of(*written: WrittenCorpus, config: DataConfig = CONFIG) -> RowSequence:
    return RowSequence([one.corpus for one in written], config, NUM_LATENTS, 3)


@pytest.fixture(scope="module")
def rows(written: WrittenCorpus) -> tuple[PlannedRow, ...]:
    sequence = sequence_of(written)
    return sequence.read(0, sequence.sources[0].num_rows + 5).rows


def documents_of(batch: PackedBatch, row: int) -> list[tuple[int, int]]:
    """Flat (begin, end) of the documents of a row, padding included."""
    borders = batch.cu_seqlens.tolist()
    length = batch.tokens.shape[1]
    return [(begin, end) for begin, end in itertools.pairwise(borders) if row * length <= begin < (row + 1) * length]


def test_labels_and_masks_equal_a_loop_over_documents(written: WrittenCorpus, rows: tuple[PlannedRow, ...]) -> None:
    special = written.corpus.special_tokens
    sequence = sequence_of(written)
    for first in range(0, len(rows) - 3, 4):
        batch = collate_rows(sequence, rows[first : first + 4]).batch
        tokens = batch.tokens.reshape(-1).tolist()
        labels, loss_mask, position_ids = [0] * len(tokens), [False] * len(tokens), [0] * len(tokens)
        image_slots, context_slots, has_context = [], [], []
        for row in range(4):
            for begin, end in documents_of(batch, row):
                content = 0
                for flat in range(begin, end):
                    position_ids[flat] = flat - begin
                    if tokens[flat] == special.boi:
                        context_slots.append(flat)
                        image_slots.append(flat + 1)
                        has_context.append(content > 0)
                    content += tokens[flat] not in (special.bos, special.eos)
                    following = tokens[flat + 1] if flat + 1 < end else special.pad
                    if following not in (special.pad, special.image, special.eoi):
                        labels[flat], loss_mask[flat] = following, True
        assert batch.labels.reshape(-1).tolist() == labels
        assert batch.loss_mask.reshape(-1).tolist() == loss_mask
        assert batch.position_ids.reshape(-1).tolist() == position_ids
        assert batch.label_positions.tolist() == [i for i, target in enumerate(loss_mask) if target]
        assert batch.image_slots.tolist() == image_slots
        assert batch.context_slots.tolist() == context_slots
        assert batch.has_context.tolist() == has_context
        assert batch.num_images == len(image_slots)
        assert tokens.count(special.image) == NUM_LATENTS * len(image_slots)
        for slot in image_slots:
            assert tokens[slot - 1 : slot + NUM_LATENTS + 1] == (
                [special.boi] + [special.image] * NUM_LATENTS + [special.eoi]
            )


def test_borders_cover_every_row_and_padding_is_a_document(
    written: WrittenCorpus, rows: tuple[PlannedRow, ...]
) -> None:
    special = written.corpus.special_tokens
    batch = collate_rows(sequence_of(written), rows[:6]).batch
    borders = batch.cu_seqlens
    assert borders.dtype == torch.int32
    assert borders[0] == 0
    assert borders[-1] == 6 * CONFIG.seq_length
    assert batch.max_seqlen == int(borders.diff().max())
    for row in range(6):
        spans = documents_of(batch, row)
        assert spans[0][0] == row * CONFIG.seq_length
        assert spans[-1][1] == (row + 1) * CONFIG.seq_length
        kinds = [batch.tokens.reshape(-1)[begin].item() for begin, _ in spans]
        assert kinds[: len(rows[row].documents)] == [special.bos] * len(rows[row].documents)
        padding = spans[len(rows[row].documents) :]
        assert len(padding) <= 1
        for begin, end in padding:
            assert set(batch.tokens.reshape(-1)[begin:end].tolist()) == {special.pad}


def test_packed_rows_equal_documents_one_per_row(written: WrittenCorpus, rows: tuple[PlannedRow, ...]) -> None:
    sequence = sequence_of(written)
    packed = [row for row in rows if len(row.documents) > 1][:10]
    assert packed
    together = collate_rows(sequence, packed)
    alone = collate_rows(sequence, [PlannedRow(0, row.epoch, np.array([d])) for row in packed for d in row.documents])
    spans = [span for r, row in enumerate(packed) for span in documents_of(together.batch, r)[: len(row.documents)]]
    for index, (begin, end) in enumerate(spans):
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            flat = getattr(together.batch, name).reshape(-1)[begin:end]
            assert torch.equal(flat, getattr(alone.batch, name)[index, : end - begin]), name
    assert np.array_equal(together.images, alone.images)
    for name in ("image_keys", "has_context", "image_ok", "image_hashes", "context_hashes"):
        assert torch.equal(getattr(together.batch, name), getattr(alone.batch, name))
    assert len(together.batch.label_positions) == len(alone.batch.label_positions)


def test_image_keys_are_positive_and_name_image_and_epoch(written: WrittenCorpus, rows: tuple[PlannedRow, ...]) -> None:
    keys = image_key(np.array([0, 0, 1, 2**40 - 2]), np.array([0, 1, 0, 2**22]))
    assert len(set(keys.tolist())) == 4
    assert keys.min() > BLANK_KEY
    sequence = sequence_of(written)
    every = torch.cat([collate_rows(sequence, [row]).batch.image_keys for row in rows])
    assert len(every.unique()) == len(every)


def test_micro_batch_without_images_has_a_blank_slot(tmp_path: Path) -> None:
    text = write(tmp_path, [EncodedDocument([[9, 10]], [], Source("d", 1))])
    with_image = write(tmp_path / "other", random_documents(9, 4))
    sequence = sequence_of(with_image)
    sequence.sources[0].composer.corpus = text.corpus
    collated = collate_rows(sequence, [PlannedRow(0, 0, np.array([0]))])
    batch = collated.batch
    assert batch.num_images == 0
    assert len(collated.images) == 0
    assert batch.image_slots.tolist() == []
    assert batch.context_slots.tolist() == [0]
    assert batch.image_keys.tolist() == [BLANK_KEY]
    assert [batch.image_hashes.tolist(), batch.context_hashes.tolist()] == [[0], [0]]
    assert batch.image_ok.tolist() == [False]
    assert batch.pair_mask.tolist() == [False]
    assert len(batch.label_positions) == 3


def test_documents_longer_than_their_row_are_refused(written: WrittenCorpus) -> None:
    sequence = sequence_of(written)
    with pytest.raises(ValueError, match="row 1 of the micro-batch has .* tokens; it holds 96"):
        collate_rows(sequence, [PlannedRow(0, 0, np.array([0])), PlannedRow(1, 0, np.arange(100))])
