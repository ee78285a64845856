"""Oracles: every token of an epoch against the corpus's documents composed one by one; set equality; counting."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict

import numpy as np
import pytest

from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.document import ImageKind, Source
from lcl_megatron.data.planning.compose import NO_SIMILAR_IMAGE
from lcl_megatron.data.planning.mixture import RowSequence
from lcl_megatron.data.planning.rows import SourceRows
from lcl_megatron.data.storage.corpus_part import EncodedDocument
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, stored_image, write

CONFIG = DataConfig(seq_length=96, max_images_per_document=3)
SEED = 11
NUM_DOCUMENTS = 250


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    return write(tmp_path_factory.mktemp("rows"), random_documents(NUM_DOCUMENTS, 8))


def make_rows(written: WrittenCorpus, view: str = "interleaved", seed: int = SEED, **settings: object) -> SourceRows:
    config = dataclasses.replace(CONFIG, **settings)  # type: ignore[arg-type]
    return SourceRows(written.corpus, view, config, NUM_LATENTS, seed)


@pytest.mark.parametrize("layout", ["packed", "pad"])
def test_every_document_comes_once_per_epoch_and_whole(written: WrittenCorpus, layout: str) -> None:
    source = make_rows(written, layout=layout)
    usable = np.flatnonzero(source.composer.sizes(0, NUM_DOCUMENTS).lengths)
    for epoch in range(3):
        block = source.read(epoch * source.num_rows, source.num_rows, np.arange(source.num_rows))
        seen = np.concatenate([row.documents for row in block.rows])
        assert sorted(seen.tolist()) == usable.tolist()
        assert {row.epoch for row in block.rows} == {epoch}
        composed = source.composer.compose(np.arange(NUM_DOCUMENTS), epoch)
        for row, tokens, images in zip(block.rows, block.counts.num_tokens, block.counts.num_images, strict=True):
            assert tokens == composed.lengths[row.documents].sum() <= CONFIG.seq_length
            assert images == composed.num_images[row.documents].sum()
            assert layout == "packed" or len(row.documents) == 1
        statistics = source.statistics(epoch)
        assert statistics.documents == len(usable)
        assert sum(statistics.skipped.values()) + statistics.documents == NUM_DOCUMENTS
        assert statistics.rows == source.num_rows
        assert statistics.tokens == composed.lengths[seen].sum()
        assert statistics.targets == composed.num_targets[seen].sum()
        assert statistics.images == composed.num_images[seen].sum()
        context = [composed.has_context[composed.image_offsets[d] : composed.image_offsets[d + 1]].sum() for d in seen]
        assert statistics.pairs == sum(context)


def test_windows_hold_every_token_once_and_cut_no_image(written: WrittenCorpus) -> None:
    """The rows of an epoch, put back into the order of concatenation, are the documents' tokens."""
    config = dataclasses.replace(CONFIG, layout="window")
    sequence = RowSequence([written.corpus], config, NUM_LATENTS, SEED)
    (source,) = sequence.sources
    special = written.corpus.special_tokens
    for epoch in range(2):
        pieces: dict[int, dict[int, list[int]]] = defaultdict(dict)
        for row in sequence.read(epoch * source.num_rows, source.num_rows).rows:
            assert row.begins is not None
            assert (row.begins[1:] == 0).all()
            batch = collate_rows(sequence, [row]).batch
            borders = batch.cu_seqlens.tolist()
            tokens = batch.tokens.reshape(-1).tolist()
            for i, document in enumerate(row.documents.tolist()):
                pieces[document][int(row.begins[i])] = tokens[borders[i] : borders[i + 1]]
            padding = tokens[borders[len(row.documents)] :]
            assert set(padding) <= {special.pad}
            # Only an image that did not fit leaves a row unfilled, or the end of the corpus.
            assert len(padding) < NUM_LATENTS + 2 or row.documents[-1] == source.table.documents[-1]
        usable = np.flatnonzero(source.composer.sizes(0, NUM_DOCUMENTS).lengths)
        assert sorted(pieces) == usable.tolist()
        composed = source.composer.compose(usable, epoch)
        for i, document in enumerate(usable.tolist()):
            found = [token for _, piece in sorted(pieces[document].items()) for token in piece]
            assert found == source.composer.tokens(composed, i).tolist()
            for piece in pieces[document].values():
                assert piece.count(special.boi) * NUM_LATENTS == piece.count(special.image)


def test_epochs_and_seeds_differ_in_order_and_in_company(written: WrittenCorpus) -> None:
    source, other = make_rows(written), make_rows(written, seed=SEED + 1)
    count = np.arange(source.num_rows)
    epochs = [source.read(epoch * len(count), len(count), count).rows for epoch in (0, 1)]
    orders = [[row.documents.tolist() for row in rows] for rows in (*epochs, other.read(0, len(count), count).rows)]
    company = [{tuple(sorted(row)) for row in rows if len(row) > 1} for rows in orders]
    for a, b in ((0, 1), (0, 2)):
        assert orders[a] != orders[b]
        assert len(company[a] & company[b]) < len(company[a]) / 2


def test_rows_are_not_sorted_by_length(written: WrittenCorpus) -> None:
    """Packing yields long rows first; a run must not: rank correlation of place and documents within 4 sigma."""
    source = make_rows(written)
    counts = [len(row.documents) for row in source.read(0, source.num_rows, np.arange(source.num_rows)).rows]
    assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 4 / len(counts) ** 0.5


def test_images_come_evenly(written: WrittenCorpus) -> None:
    """The sum over any stretch of rows is within a few images of its share, not as in a random order."""
    source = make_rows(written)
    images = source.read(0, 3 * source.num_rows, np.arange(3 * source.num_rows)).counts.num_images
    drift = np.cumsum(images) - images.mean() * np.arange(1, len(images) + 1)
    at_random = np.cumsum(np.random.default_rng(0).permutation(images) - images.mean())
    assert np.ptp(drift) < 2.5 * images.max() < np.ptp(at_random)


def test_reading_in_pieces_equals_reading_at_once(written: WrittenCorpus) -> None:
    for layout in ("packed", "pad", "window"):
        source = make_rows(written, layout=layout)
        whole = source.read(0, 60, np.arange(60))
        for first in (0, 7, 59):
            (row,) = source.read(first, 1, np.array([first])).rows
            expected = whole.rows[first]
            assert (row.index, row.epoch) == (expected.index, expected.epoch)
            assert np.array_equal(row.documents, expected.documents)
            assert layout != "window" or np.array_equal(row.begins, expected.begins)


def test_row_image_budget_holds(written: WrittenCorpus) -> None:
    source = make_rows(written, max_images_per_row=4, seq_length=400)
    assert source.read(0, source.num_rows, np.arange(source.num_rows)).counts.num_images.max() == 4
    assert make_rows(written, seq_length=400).table.image_counts.max() > 4


def test_limits_beyond_what_a_row_holds_are_no_limits(written: WrittenCorpus) -> None:
    """(96 - 2) / 6 = 15 images fit a row: tables do not grow with numbers that mean "as many as there are"."""
    expected = make_rows(written, max_images_per_document=15).table.arrays()
    found = make_rows(written, max_images_per_document=10**12).table.arrays()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name
    budgeted = make_rows(written, max_images_per_document=10**12, max_images_per_row=10**12)
    assert budgeted.statistics().documents == make_rows(written).statistics().documents


def test_row_image_budget_of_pairs_is_that_of_their_single_images(written: WrittenCorpus) -> None:
    source = make_rows(written, "pairs", max_images_per_row=2)
    assert source.read(0, source.num_rows, np.arange(source.num_rows)).counts.num_images.max() == 2


def test_documents_with_too_many_images_are_skipped_if_asked(written: WrittenCorpus) -> None:
    good = [sum(m.segment.similarity > 0.24 for m in d.images) for d in written.documents]
    source = make_rows(written, too_many_images="skip", seq_length=2048)
    documents = np.concatenate([row.documents for row in source.read(0, source.num_rows, np.arange(1000)).rows])
    assert sorted(documents.tolist()) == [i for i, count in enumerate(good) if 1 <= count <= 3]
    assert source.left_out[NO_SIMILAR_IMAGE] == good.count(0)


def test_pairs_are_each_image_with_its_sentence(written: WrittenCorpus) -> None:
    config = dataclasses.replace(CONFIG, view=("pairs",))
    sequence = RowSequence([written.corpus], config, NUM_LATENTS, SEED)
    special = written.corpus.special_tokens
    expected, number = [], 0
    for document in written.documents:
        for image in document.images:
            place = image.segment
            text = list(document.segments[place.segment_index]) if place.kind is ImageKind.MATCHED else []
            if text and place.similarity > 0.24 and len(text) + NUM_LATENTS + 4 <= CONFIG.seq_length:
                expected.append((number, text))
            number += 1
    shown = [special.boi, *[special.image] * NUM_LATENTS, special.eoi]
    before = 0
    for epoch in range(2):
        found = []
        num_rows = sequence.sources[0].num_rows
        for row in sequence.read(epoch * num_rows, num_rows).rows:
            collated = collate_rows(sequence, [row])
            borders, tokens = collated.batch.cu_seqlens.tolist(), collated.batch.tokens.reshape(-1).tolist()
            for i, image in enumerate(collated.images.tolist()):
                piece = tokens[borders[i] : borders[i + 1]]
                text = [token for token in piece[1:-1] if token not in shown]
                image_first = piece == [special.bos, *shown, *text, special.eos]
                assert image_first or piece == [special.bos, *text, *shown, special.eos]
                assert collated.batch.has_context[i] == (not image_first)
                before += image_first
                found.append((image, text))
        assert sorted(found) == expected
    # Placement is a fair coin: within 4 standard errors.
    assert abs(before / (2 * len(expected)) - 0.5) < 4 * 0.5 / (2 * len(expected)) ** 0.5


@pytest.mark.parametrize("placement", ["text_first", "image_first"])
def test_pairs_in_one_order_are_the_same_pairs_all_contrasted_or_none(written: WrittenCorpus, placement: str) -> None:
    random, ordered = (
        RowSequence(
            [written.corpus], dataclasses.replace(CONFIG, view=("pairs",), pair_placement=name), NUM_LATENTS, SEED
        )
        for name in ("random", placement)
    )
    special = written.corpus.special_tokens
    shown = [special.boi, *[special.image] * NUM_LATENTS, special.eoi]
    num_rows = ordered.sources[0].num_rows
    assert num_rows == random.sources[0].num_rows
    other = random.read(0, num_rows)
    assert 0 < other.has_context.sum() < len(other.has_context)
    for row, same in zip(ordered.read(0, num_rows).rows, other.rows, strict=True):
        assert row.documents.tolist() == same.documents.tolist()
        batch = collate_rows(ordered, [row]).batch
        assert set(batch.has_context.tolist()) == {placement == "text_first"}
        borders, tokens = batch.cu_seqlens.tolist(), batch.tokens.reshape(-1).tolist()
        for begin, end in itertools.pairwise(borders[: len(row.documents) + 1]):
            image = tokens[begin + 1 : end - 1][-len(shown) :] if placement == "text_first" else tokens[begin + 1 :]
            assert image[: len(shown)] == shown


def test_pairs_that_are_left_out_are_counted(tmp_path_factory: pytest.TempPathFactory) -> None:
    images = [
        stored_image(0, 0, 0.1, ImageKind.MATCHED, b"x"),
        stored_image(1, 1, 1.0, ImageKind.MATCHED, b"x"),
        stored_image(2, 2, 1.0, ImageKind.MATCHED, b"x"),
        stored_image(3, 3, 1.0, ImageKind.MATCHED, b"x"),
        stored_image(4, 4, 1.0, ImageKind.INLINE, b"x"),
    ]
    document = EncodedDocument([[9], [], [9] * 90, [9, 9]], images, Source("d", 1))
    source = make_rows(write(tmp_path_factory.mktemp("pairs"), [document]), "pairs")
    assert source.left_out == {
        "image that is matched to no sentence": 1,
        "no image of sufficient similarity": 1,
        "image whose sentence is empty": 1,
        "pair longer than seq_length": 1,
    }
    assert source.num_rows == 1


def test_impossible_configurations_are_refused(written: WrittenCorpus) -> None:
    with pytest.raises(ConfigError, match="max_images_per_row = 2 is less than the images of a document, up to 3 with"):
        make_rows(written, max_images_per_row=2)
    with pytest.raises(ConfigError, match=r"none of the 250 documents of .*min_similarity = 0.9"):
        make_rows(written, min_similarity=0.9)


def test_a_corpus_whose_images_can_never_stand_in_a_row_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    document = EncodedDocument([[9] * 40, [9]], [stored_image(0, 1, 1.0, ImageKind.MATCHED, b"x")], Source("d", 1))
    written = write(tmp_path_factory.mktemp("cut"), [document])
    with pytest.raises(ConfigError, match="'all images behind the cut at seq_length': 1"):
        make_rows(written, seq_length=20)
