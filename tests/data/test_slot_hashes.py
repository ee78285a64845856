"""Hashes of images and contexts. Oracles: the bytes of the images and the tokens themselves, compared as they are;
numbers written down once, for hashes must be the same on every rank and machine; SHA-256 by ``hashlib``.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.config import DataConfig
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.document import ImageKind, Source
from lcl_megatron.data.planning.mixture import RowSequence
from lcl_megatron.data.slot_hashes import context_hashes, image_hashes
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument
from lcl_megatron.data.storage.corpus_writer import write_corpus
from lcl_megatron.data.tokenizer import SpecialTokens
from tests.data.corpora import NUM_LATENTS, stored_image, tiny_tokenizer

SPECIAL = SpecialTokens(bos=1, eos=2, pad=3, boi=4, eoi=5, image=6)
PICTURES = (b"a", b"b", b"c")


def hashes_of(documents: Sequence[Sequence[int]], files: Sequence[int]) -> list[int]:
    """Context hashes of documents one behind the other."""
    tokens = np.concatenate([np.array(document, dtype=np.int64) for document in documents])
    position_ids = np.concatenate([np.arange(len(document)) for document in documents])
    contexts = np.flatnonzero(tokens == SPECIAL.boi)
    return context_hashes(tokens, position_ids, contexts, np.array(files, dtype=np.uint64), SPECIAL).tolist()


SHOWN = [SPECIAL.boi, SPECIAL.image, SPECIAL.image, SPECIAL.eoi]


def test_contexts_are_equal_where_their_tokens_and_images_are() -> None:
    bos, eos = SPECIAL.bos, SPECIAL.eos
    documents = [
        [bos, 9, 10, *SHOWN, 11, *SHOWN, eos],
        [bos, 9, 10, *SHOWN, 11, *SHOWN, eos],  # the same, but the first image is another one
        [bos, 9, 10, *SHOWN, 11, *SHOWN, 12, eos],  # the first document but for its end
        [bos, 10, 9, *SHOWN, eos],  # other order
        [bos, 9, 9, 10, *SHOWN, eos],  # longer
        [9, 10, *SHOWN, eos],  # cut off by the border of a row: another context than with <BoS>
    ]
    found = hashes_of(documents, [70, 71, 72, 71, 70, 99, 5, 6, 7])
    first, second, other_first, other_second, third, fourth, *rest = found
    assert first == other_first == third
    assert second == fourth
    assert len({first, second, other_second, *rest}) == 6
    assert min(found) > 0


def test_contexts_without_content_are_empty() -> None:
    documents = [[SPECIAL.bos, *SHOWN, 9], [*SHOWN, *SHOWN], [SPECIAL.bos, *SHOWN, *SHOWN]]
    assert [value == 0 for value in hashes_of(documents, [1, 2, 3, 4, 5])] == [True, True, False, True, False]


def test_a_context_does_not_depend_on_what_stands_elsewhere() -> None:
    document = [SPECIAL.bos, 9, 10, *SHOWN, 11, *SHOWN, SPECIAL.eos]
    alone = hashes_of([document], [7, 8])
    for before in ([], [20, 21], [SPECIAL.bos, *SHOWN, 9]):
        files = [3] * before.count(SPECIAL.boi)
        assert hashes_of([before, document, [SPECIAL.pad] * 3], [*files, 7, 8])[len(files) :] == alone


def mix(*words: int) -> int:
    """The hash that ``data/order.py`` defines, in Python's own integers."""
    value = 0
    for word in words:
        value = (value + (word + 1) * 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    return value


def test_hashes_are_those_of_every_run() -> None:
    """Two ranks, or a run and the run that goes on with it, must find the same repeats."""
    words = [SPECIAL.bos, 9, 10, 2**64 - 1, SPECIAL.image, SPECIAL.image, SPECIAL.eoi, 11]
    expected = [mix(sum(mix(i, word) for i, word in enumerate(words[:end])) % 2**64) >> 1 for end in (3, 8)]
    assert hashes_of([[SPECIAL.bos, 9, 10, *SHOWN, 11, *SHOWN]], [2**64 - 1, 0]) == expected
    assert expected == [9167803240856099258, 1086134300406247763]
    assert image_hashes(np.array([0, 1, 2, 2**64 - 1], dtype=np.uint64)).tolist() == [0, 0, 1, 2**63 - 1]


def write_twice(folder: Path) -> list[Corpus]:
    """Two corpora of random documents with few words and pictures, most of which occur in both."""
    rng = np.random.default_rng(0)
    documents = []
    for number in range(120):
        texts = [rng.integers(7, 9, int(rng.integers(0, 3))).tolist() for _ in range(rng.integers(1, 4))]
        places = sorted(rng.integers(0, len(texts), rng.integers(1, 4)).tolist())
        kinds = [ImageKind(int(kind)) for kind in rng.integers(0, 2, len(places))]
        pictures = [PICTURES[int(i)] for i in rng.integers(0, len(PICTURES), len(places))]
        images = [
            stored_image(i, place, 0.5, kind, data)
            for i, (place, kind, data) in enumerate(zip(places, kinds, pictures, strict=True))
        ]
        documents.append(EncodedDocument(texts, images, Source("d", number + 1)))
    tokenizer = tiny_tokenizer(folder)
    parts = documents[:100], documents[20:]
    return [write_corpus(folder / f"corpus{i}", part, tokenizer) for i, part in enumerate(parts)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    return write_twice(tmp_path_factory.mktemp("twice"))


@pytest.mark.parametrize(
    ("view", "layout"),
    [("interleaved", "packed"), ("interleaved", "pad"), ("interleaved", "window"), ("pairs", "packed")],
)
def test_hashes_of_a_run_are_equal_exactly_where_the_content_is(corpora: list[Corpus], view: str, layout: str) -> None:
    config = DataConfig(
        seq_length=32,
        view=(view,),
        layout=layout,
        context_rule="index",
        max_images_per_document=3,
        data_path=("a", "b"),
    )
    sequence = RowSequence(corpora, config, NUM_LATENTS, 3)
    rows = sequence.read(0, 3 * sum(source.num_rows for source in sequence.sources)).rows
    special = sequence.special_tokens
    by_image: dict[bytes, set[int]] = {}
    by_context: dict[tuple[int | bytes, ...], set[int]] = {}
    for first in range(0, len(rows), 7):
        collated = collate_rows(sequence, rows[first : first + 7])
        batch, tokens = collated.batch, collated.batch.tokens.flatten().tolist()
        shown = {
            slot: sequence.image_bytes(number)
            for slot, number in zip(batch.context_slots.tolist(), collated.images.tolist(), strict=False)
        }
        content: list[int | bytes] = [shown.get(flat, token) for flat, token in enumerate(tokens)]
        borders = batch.cu_seqlens.tolist()
        for index, (slot, data) in enumerate(shown.items()):
            begin = max(border for border in borders if border <= slot)
            context = tuple(content[begin:slot])
            if set(context) <= {special.bos}:
                context = ()
            by_image.setdefault(data, set()).add(int(batch.image_hashes[index]))
            by_context.setdefault(context, set()).add(int(batch.context_hashes[index]))
            assert batch.image_hashes[index] == int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1
    assert by_image.keys() == set(PICTURES)
    for found in (by_image, by_context):
        assert all(len(hashes) == 1 for hashes in found.values())
        assert len(set(itertools.chain.from_iterable(found.values()))) == len(found)
    assert by_context[()] == {0}
    assert len(by_context) > 5
