"""Whole documents into rows: best fit over a whole corpus at once, in time that does not depend on its size.

Documents that need the same of a row are interchangeable. So classes of documents are packed, with their numbers, and
what comes out is not rows but *patterns* of rows: "a document of 1,200 tokens with one of 840, 3,112 times". After
Krell et al., Efficient Sequence Packing without Cross-contamination, 2021 (arXiv 2107.02027), but best fit in the
order of decreasing length, as if document by document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Slot(NamedTuple):
    """A place for a document in the rows of a pattern."""

    document_class: int
    """Class of the document."""
    first: int
    """Number within its class of the document in the pattern's first row; the next row has the next document."""


class Pattern(NamedTuple):
    """Rows that hold documents of the same classes."""

    slots: tuple[Slot, ...]
    """Places of a row, the longest document first."""
    num_rows: int
    """How many rows there are."""


@dataclass(frozen=True)
class DocumentClasses:
    """Documents by what they need of a row. c classes."""

    lengths: np.ndarray
    """(c,) int64, tokens of each document."""
    num_images: np.ndarray
    """(c,) int64, images of each document."""
    counts: np.ndarray
    """(c,) int64, documents of the class."""


def one_per_row(classes: DocumentClasses) -> list[Pattern]:
    """Return patterns of one document per row."""
    return [Pattern((Slot(index, 0),), int(count)) for index, count in enumerate(classes.counts)]


def pack(classes: DocumentClasses, capacity: int, image_capacity: int = 0) -> list[Pattern]:
    """Pack all documents into few rows: the longest first, each into the fullest row that has room for it.

    Every document stands in exactly one slot of one row. The result equals best-fit-decreasing document by document.

    Args:
        classes: The documents.
        capacity: Tokens of a row.
        image_capacity: Images that a row may hold; 0 = no limit.

    Raises:
        ValueError: If a document fits into no row.
    """
    images = classes.num_images if image_capacity else np.zeros_like(classes.num_images)
    for name, values, low, limit in (
        ("tokens", classes.lengths, 1, capacity),
        ("images", images, 0, image_capacity),
    ):
        if values.size and (values.min() < low or values.max() > limit):
            raise ValueError(f"documents of {values.min()} to {values.max()} {name}; a row holds {low} to {limit}")
    rows = _OpenRows(capacity, image_capacity)
    for index in np.lexsort((-images, -classes.lengths)).tolist():
        rows.add(index, int(classes.lengths[index]), int(images[index]), int(classes.counts[index]))
    return rows.patterns()


class _OpenRows:
    """Rows that are being filled, in groups of equal content.

    The free tokens of all groups are one integer per number of free images, with a bit per amount, so that the
    fullest row with room for a document is its lowest set bit above the document's length.
    """

    def __init__(self, capacity: int, image_capacity: int) -> None:
        self._capacity = capacity
        self._image_capacity = image_capacity
        self._groups: list[dict[int, list[Pattern]]] = [{} for _ in range(image_capacity + 1)]
        self._free = [0] * (image_capacity + 1)

    def add(self, index: int, length: int, images: int, count: int) -> None:
        """Place ``count`` documents of one class."""
        first = 0
        while first < count:
            group, tokens_left, images_left = self._fullest(length, images)
            if group is None:
                group = Pattern((), count - first)  # as many empty rows as can be needed
            # The fullest row stays the fullest until nothing more fits, so each is filled before the next.
            each = min(tokens_left // length, images_left // images if images else count)
            full_rows = min(group.num_rows, (count - first) // each)
            rest = 0 if full_rows == group.num_rows else (count - first) - full_rows * each
            for rows, documents in ((full_rows, each), (min(1, rest), rest)):
                if rows:
                    slots = tuple(Slot(index, first + i * rows) for i in range(documents))
                    filled = Pattern(group.slots + slots, rows)
                    self._put(filled, tokens_left - documents * length, images_left - documents * images)
                    group = _without(group, rows)
                    first += rows * documents
            if group.slots and group.num_rows:
                self._put(group, tokens_left, images_left)

    def patterns(self) -> list[Pattern]:
        """Return all rows."""
        return [group for by_space in self._groups for groups in by_space.values() for group in groups]

    def _fullest(self, length: int, images: int) -> tuple[Pattern | None, int, int]:
        """Take the group with the least sufficient free tokens out, among equals the one with fewest free images."""
        best, left = self._capacity + 1, -1
        for images_left in range(images, self._image_capacity + 1):
            fitting = self._free[images_left] >> length
            if fitting and (space := length + (fitting & -fitting).bit_length() - 1) < best:
                best, left = space, images_left
        if left < 0:
            return None, self._capacity, self._image_capacity
        groups = self._groups[left][best]
        group = groups.pop()
        if not groups:
            self._free[left] ^= 1 << best
        return group, best, left

    def _put(self, group: Pattern, tokens_left: int, images_left: int) -> None:
        self._groups[images_left].setdefault(tokens_left, []).append(group)
        self._free[images_left] |= 1 << tokens_left


def _without(group: Pattern, rows: int) -> Pattern:
    """Return a group without its first rows."""
    slots = tuple(Slot(slot.document_class, slot.first + rows) for slot in group.slots)
    return Pattern(slots, group.num_rows - rows)
