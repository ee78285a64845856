"""Oracles: counting shares over stretches of rows; the sequences of the corpora alone; the corpora's own images."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.document import ImageKind, Source
from lcl_megatron.data.planning.mixture import RowSequence
from lcl_megatron.data.planning.table_cache import TABLE_VERSION
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument
from lcl_megatron.data.storage.corpus_writer import write_corpus
from lcl_megatron.data.tokenizer import train_tokenizer
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, stored_image, tiny_tokenizer, write

PATHS = ("a", "b", "c")
CONFIG = DataConfig(seq_length=96, max_images_per_document=3, data_path=PATHS)
SEED = 3


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = tiny_tokenizer(folder)
    sizes = ((120, 1), (900, 2), (40, 3))
    return [write_corpus(folder / f"corpus{seed}", random_documents(n, seed), tokenizer) for n, seed in sizes]


def make(corpora: list[Corpus], **settings: object) -> RowSequence:
    return RowSequence(corpora, dataclasses.replace(CONFIG, **settings), NUM_LATENTS, SEED)  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["images", "tokens"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.6, 0.1, 0.3), (2.0, 0.02, 5.0)])
@pytest.mark.parametrize("layout", ["packed", "pad", "window"])
def test_shares_hold_to_one_percent_in_any_thousand_rows(
    corpora: list[Corpus], unit: str, weights: tuple[float, ...], layout: str
) -> None:
    sequence = make(corpora, mixture_weights=weights, mixture_by=unit, layout=layout)
    block = sequence.read(12_345, 4000)
    source = np.array([row.source for row in block.rows])
    amount = block.counts.num_images if unit == "images" else block.counts.num_tokens
    cumulated = np.array([np.cumsum(np.where(source == i, amount, 0)) for i in range(3)])
    stretches = cumulated[:, 1000:] - cumulated[:, :-1000]
    shares = stretches / stretches.sum(axis=0)
    assert np.abs(shares.T - np.array(weights) / sum(weights)).max() < 0.01


def test_without_weights_all_corpora_end_their_epochs_together(corpora: list[Corpus]) -> None:
    sequence = make(corpora)
    total = sum(source.num_rows for source in sequence.sources)
    for epoch in range(2):
        rows = sequence.read(epoch * total, total).rows
        assert {row.epoch for row in rows} == {epoch}
        assert Counter(row.source for row in rows) == {i: s.num_rows for i, s in enumerate(sequence.sources)}


def test_each_corpus_keeps_its_own_sequence(corpora: list[Corpus]) -> None:
    sequence = make(corpora, mixture_weights=(1.0, 2.0, 3.0))
    block = sequence.read(500, 300)
    assert [row.index for row in block.rows] == list(range(500, 800))
    first = {i: sum(row.source == i for row in sequence.read(0, 500).rows) for i in range(3)}
    for number, source in enumerate(sequence.sources):
        mixed = [row for row in block.rows if row.source == number]
        alone = source.read(first[number], len(mixed), np.arange(len(mixed)))
        assert [row.documents.tolist() for row in mixed] == [row.documents.tolist() for row in alone.rows]
        here = np.array([row.source == number for row in block.rows])
        assert np.array_equal(block.counts.num_images[here], alone.counts.num_images)
        assert np.array_equal(np.repeat(here, block.counts.num_images).nonzero()[0].size, len(alone.has_context))
        context = block.has_context[np.repeat(here, block.counts.num_images)]
        assert np.array_equal(context, alone.has_context)


def test_collated_rows_of_several_corpora_equal_each_row_alone(corpora: list[Corpus]) -> None:
    sequence = make(corpora, mixture_weights=(1.0, 1.0, 1.0), view=("interleaved", "pairs", "interleaved"))
    rows = sequence.read(0, 12).rows
    assert len({row.source for row in rows}) == 3
    together, alone = collate_rows(sequence, rows), [collate_rows(sequence, [row]) for row in rows]
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        whole = getattr(together.batch, name)
        for number, single in enumerate(alone):
            assert whole[number].equal(getattr(single.batch, name)[0]), name
    assert together.images.tolist() == [image for single in alone for image in single.images.tolist()]
    keys = [key for single in alone for key in single.batch.image_keys.tolist()]
    assert together.batch.image_keys.tolist() == keys


def test_images_of_all_corpora_are_found_by_the_runs_number(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    documents = [random_documents(12, seed, with_pixels=True) for seed in (5, 6)]
    corpora = [write_corpus(tmp_path / name, d, tokenizer) for name, d in zip("xy", documents, strict=True)]
    sequence = make(corpora, data_path=("x", "y"))
    images = [image.data for part in documents for document in part for image in document.images]
    assert [sequence.image_bytes(i) for i in range(len(images))] == images
    assert sequence.image_begins.tolist() == [0, corpora[0].num_images, len(images)]
    assert sequence.image_source(corpora[0].num_images) == f"y: {corpora[1].image_source(0)}"


def test_corpora_of_different_tokenizers_are_refused(corpora: list[Corpus], tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["quite another text", "of other words"], tmp_path / "other.model", 290)
    other = write_corpus(tmp_path / "other", random_documents(5, 1), tokenizer)
    with pytest.raises(ConfigError, match=r"other was made with another tokenizer .* than .*corpus1"):
        make([corpora[0], other], data_path=("x", "y"))
    with pytest.raises(ConfigError, match="no corpus to read; give --data-path"):
        make([], data_path=())


def test_a_corpus_that_would_never_be_read_is_refused(corpora: list[Corpus]) -> None:
    for weights in ((1.0, 1e-9, 1.0), (1.0, 1e-320, 1.0)):
        with pytest.raises(ConfigError, match=r"corpus2 would give less than one of 2097152 rows .* leave it out"):
            make(corpora, mixture_weights=weights)
    sequence = make(corpora, mixture_weights=(1.0, 1e-5, 1.0))
    assert {row.source for row in sequence.read(0, 300_000).rows} == {0, 1, 2}


def test_a_corpus_that_shows_no_image_can_have_a_share_of_tokens_only(corpora: list[Corpus], tmp_path: Path) -> None:
    """Its image fits into the row before its sentence but not behind it, where half of all seeds put it."""
    image = stored_image(0, 0, 1.0, ImageKind.MATCHED, b"x")
    tokenizer = tiny_tokenizer(tmp_path)
    hidden = write_corpus(tmp_path / "hidden", [EncodedDocument([[9] * 90], [image], Source("d", 1))], tokenizer)
    alone = dataclasses.replace(CONFIG, data_path=("y",), seq_length=97)
    is_hidden = [RowSequence([hidden], alone, NUM_LATENTS, s).read(0, 1).counts.num_images[0] == 0 for s in range(20)]
    assert 0 < sum(is_hidden) < 20
    seed = is_hidden.index(True)
    config = dataclasses.replace(alone, data_path=("x", "y"), mixture_weights=(1.0, 1.0))
    with pytest.raises(ConfigError, match=r"rows of .*hidden show no images: .*seq_length = 97.*--mixture-by tokens"):
        RowSequence([corpora[0], hidden], config, NUM_LATENTS, seed)
    by_tokens = dataclasses.replace(config, mixture_by="tokens")
    assert RowSequence([corpora[0], hidden], by_tokens, NUM_LATENTS, seed).row_shares[1] > 0


def test_a_corpus_that_is_there_twice_is_refused_unless_in_another_view(corpora: list[Corpus]) -> None:
    twice = [corpora[0], corpora[0]]
    with pytest.raises(ConfigError, match=r"corpus1 holds the same documents as .*corpus1, .* 'interleaved'.* once"):
        make(twice, data_path=("x", "y"))
    sequence = make(twice, data_path=("x", "y"), view=("interleaved", "pairs"))
    assert [len(source.left_out) for source in sequence.sources] == [2, 4]


def test_description_names_corpora_and_settings(corpora: list[Corpus]) -> None:
    one, two = make(corpora), make(corpora[::-1])
    assert one.description["corpus 1"] == corpora[1].fingerprint
    assert one.description["version of rows"] == str(TABLE_VERSION)
    assert one.fingerprint != two.fingerprint
    assert make(corpora, mixture_weights=(1.0, 1.0, 2.0)).fingerprint != one.fingerprint


def test_one_corpus_alone_is_its_own_sequence(tmp_path: Path) -> None:
    written: WrittenCorpus = write(tmp_path, random_documents(50, 2))
    sequence = make([written.corpus], data_path=("a",))
    assert sequence.row_shares.tolist() == [1.0]
    expected = sequence.sources[0].read(17, 30, np.arange(17, 47))
    found = sequence.read(17, 30)
    assert [row.documents.tolist() for row in found.rows] == [row.documents.tolist() for row in expected.rows]
