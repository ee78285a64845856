"""Oracle: a textbook best-fit-decreasing in quadratic time, document by document."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.data.planning.packing import DocumentClasses, Pattern, one_per_row, pack

documents = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=80)
few_lengths = st.lists(st.tuples(st.sampled_from([3, 7, 10, 26, 50]), st.integers(0, 2)), max_size=200)
Items = list[tuple[int, int]]


def classes_of(items: Items) -> DocumentClasses:
    kinds = sorted(Counter(items).items())
    columns = [(length, images, count) for (length, images), count in kinds]
    return DocumentClasses(*np.array(columns, dtype=np.int64).reshape(-1, 3).T)


def rows_of(patterns: list[Pattern], classes: DocumentClasses) -> list[Items]:
    """(length, images) of the documents of every row; fails unless every document stands in exactly one."""
    rows, seen = [], []
    for pattern in patterns:
        for row in range(pattern.num_rows):
            members = [(slot.document_class, slot.first + row) for slot in pattern.slots]
            seen += members
            rows.append([(int(classes.lengths[c]), int(classes.num_images[c])) for c, _ in members])
    assert sorted(seen) == [(c, i) for c, count in enumerate(classes.counts) for i in range(count)]
    return rows


def textbook_rows(items: Items, capacity: int, image_capacity: int) -> list[tuple[int, int]]:
    """Best-fit-decreasing; returns (tokens, images) of the rows."""
    rows: list[list[int]] = []
    for length, images in sorted(items, key=lambda item: (-item[0], -item[1])):
        fitting = [r for r in rows if r[0] + length <= capacity and r[1] + images <= image_capacity]
        best = max(fitting, key=lambda r: (r[0], r[1]), default=None)
        if best is None:
            rows.append([length, images])
        else:
            best[0] += length
            best[1] += images
    return sorted((r[0], r[1]) for r in rows)


def sums(rows: list[Items]) -> list[tuple[int, int]]:
    return sorted((sum(length for length, _ in row), sum(images for _, images in row)) for row in rows)


@given(items=documents | few_lengths)
def test_packing_equals_textbook_best_fit_decreasing(items: Items) -> None:
    classes = classes_of(items)
    found = [tokens for tokens, _ in sums(rows_of(pack(classes, 50), classes))]
    assert found == [tokens for tokens, _ in textbook_rows([(length, 0) for length, _ in items], 50, 0)]


@given(items=documents | few_lengths)
def test_packing_under_two_budgets_equals_textbook(items: Items) -> None:
    classes = classes_of(items)
    found = sums(rows_of(pack(classes, 50, 6), classes))
    assert all(tokens <= 50 and images <= 6 for tokens, images in found)
    assert found == textbook_rows(items, 50, 6)


def test_packing_time_does_not_depend_on_the_number_of_documents() -> None:
    """A billion documents of three kinds: 12 + 12 + 26 fill a row, then 26 + 24 would."""
    classes = DocumentClasses(np.array([12, 26, 50]), np.array([1, 2, 1]), np.array([10**9, 4 * 10**8, 10**8]))
    patterns = {tuple(slot.document_class for slot in p.slots): p.num_rows for p in pack(classes, 50)}
    assert patterns == {(2,): 10**8, (1, 0, 0): 4 * 10**8, (0, 0, 0, 0): 5 * 10**7}


def test_one_per_row() -> None:
    classes = classes_of([(3, 1), (3, 1), (9, 2)])
    assert rows_of(one_per_row(classes), classes) == [[(3, 1)], [(3, 1)], [(9, 2)]]


def test_packing_fills_rows_of_webpage_lengths() -> None:
    """Log-normal text of mean 425 and 1 to 6 images of 198: the lengths that the paper's MMC4 rules give."""
    rng = np.random.default_rng(0)
    text = rng.lognormal(np.log(425) - 0.32, 0.8, 4096)
    lengths = np.minimum(2048, text + 198 * rng.choice([1, 2, 3, 4, 5, 6], 4096, p=[0.4, 0.2, 0.13, 0.1, 0.1, 0.07]))
    classes = classes_of([(int(length), 1) for length in lengths])
    rows = sum(pattern.num_rows for pattern in pack(classes, 2048))
    assert lengths.astype(int).sum() / (2048 * rows) > 0.985


def test_packing_refuses_what_fits_nowhere() -> None:
    with pytest.raises(ValueError, match="documents of 3 to 51 tokens; a row holds 1 to 50"):
        pack(classes_of([(3, 0), (51, 0)]), 50)
    with pytest.raises(ValueError, match="documents of 1 to 7 images; a row holds 0 to 6"):
        pack(classes_of([(3, 1), (5, 7)]), 50, 6)
