"""Oracle: counting. Whatever the documents, every epoch has each of them once and whole, in rows that hold them."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.data.planning.packing import DocumentClasses, one_per_row, pack
from lcl_megatron.data.planning.row_table import PatternTable

CAPACITY, MOST_IMAGES = 60, 6
documents = st.lists(st.tuples(st.integers(1, CAPACITY), st.integers(0, MOST_IMAGES)), min_size=1, max_size=120)


@given(
    items=documents,
    budget=st.sampled_from([0, MOST_IMAGES, 9]),
    padded=st.booleans(),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_has_every_document_once(
    items: list[tuple[int, int]], budget: int, padded: bool, seed: int, epoch: int
) -> None:
    kinds = sorted(Counter(items).items())
    lengths, images, counts = np.array([(*kind, count) for kind, count in kinds], dtype=np.int64).T
    classes = DocumentClasses(lengths, images, counts)
    patterns = one_per_row(classes) if padded else pack(classes, CAPACITY, budget)
    by_class = np.array(sorted(range(len(items)), key=lambda i: items[i]), dtype=np.int32)
    table = PatternTable.of(classes, patterns, by_class, CAPACITY)
    rows = np.arange(table.num_rows)
    pieces = table.pieces(rows, np.full(len(rows), epoch), seed)
    assert sorted(pieces.documents.tolist()) == list(range(len(items)))
    assert (np.diff(pieces.owner) >= 0).all()
    assert set(pieces.owner.tolist()) == set(rows.tolist())
    tokens, shown = (
        np.bincount(pieces.owner, weights=[items[i][column] for i in pieces.documents], minlength=len(rows))
        for column in (0, 1)
    )
    assert tokens.max() <= CAPACITY
    assert not budget or padded or shown.max() <= budget
    assert np.array_equal(shown, np.repeat(table.image_counts, table.rows_per_group))
    assert not padded or len(rows) == len(items)
    # The same rows asked for one by one, in another order, hold the same documents.
    for row in rows[::-7].tolist():
        alone = table.pieces(np.array([row]), np.array([epoch]), seed)
        assert np.array_equal(alone.documents, pieces.documents[pieces.owner == row])


def test_the_documents_that_meet_change_from_epoch_to_epoch() -> None:
    classes = DocumentClasses(np.array([20, 40]), np.array([1, 1]), np.array([50, 50]))
    table = PatternTable.of(classes, pack(classes, CAPACITY), np.arange(100), CAPACITY)
    assert table.num_rows == 50
    rows = np.arange(50)
    pairs = [
        {tuple(sorted(pair)) for pair in table.pieces(rows, np.full(50, epoch), 3).documents.reshape(-1, 2).tolist()}
        for epoch in (0, 1)
    ]
    # Of 50 random pairs about one is met again.
    assert len(pairs[0] & pairs[1]) < 8
