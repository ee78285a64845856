"""All rows of one epoch of one corpus, as a table that is built once and looked up by row.

Rows are grouped by what they hold, images and tokens, so that a sequence of rows can draw evenly from all groups.
Inside a group they are numbered; which of them comes when is decided by ``rows.SourceRows``, anew per epoch.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lcl_megatron.data.order import Stream, keyed_hash, permute
from lcl_megatron.data.planning.compose import UNLIMITED, concatenate_ranges
from lcl_megatron.data.planning.packing import DocumentClasses, Pattern

TOKEN_GROUPS = 8
"""Rows with as many images are told apart by their tokens, in so many steps from empty to full."""


@dataclass(frozen=True)
class RowPieces:
    """Which documents stand in some rows. k pieces."""

    owner: np.ndarray
    """(k,) int64, position of the piece's row among the rows asked for; ascending."""
    documents: np.ndarray
    """(k,) int64, documents as the composer counts them."""
    begins: np.ndarray | None = None
    """(k,) int64, first token of each document that stands in the row; None = all rows hold whole documents."""
    ends: np.ndarray | None = None
    """(k,) int64, token behind the last one; UNLIMITED = to the document's end."""


@dataclass(frozen=True)
class RowTable(ABC):
    """Rows of one epoch; all arrays may be memory-mapped."""

    image_counts: np.ndarray
    """(groups,) int64, images of the rows of each group (at most so many where a tail is cut)."""
    rows_per_group: np.ndarray
    """(groups,) int64."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return int(self.rows_per_group.sum())

    @abstractmethod
    def pieces(self, rows: np.ndarray, epochs: np.ndarray, seed: int) -> RowPieces:
        """Return what stands in rows; rows are numbered group by group.

        Args:
            rows: (r,) int64 in [0, num_rows).
            epochs: (r,) int64.
            seed: Seed of the run.
        """

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> RowTable:
        """Return the table of ``arrays``."""
        return cls(**arrays)


@dataclass(frozen=True)
class PatternTable(RowTable):
    """Rows of whole documents, as patterns (see ``packing``). p patterns, s slots, c classes, d documents."""

    documents: np.ndarray
    """(d,) int32 or int64, all documents, class by class."""
    class_begins: np.ndarray
    """(c + 1,) int64, first document of each class in ``documents``."""
    pattern_begins: np.ndarray
    """(p + 1,) int64, first row of each pattern; patterns stand in the order of their groups."""
    slot_begins: np.ndarray
    """(p + 1,) int64, first slot of each pattern."""
    slot_classes: np.ndarray
    """(s,) int64, class of each slot's documents."""
    slot_firsts: np.ndarray
    """(s,) int64, number within its class of the document in the pattern's first row."""

    @classmethod
    def of(
        cls, classes: DocumentClasses, patterns: Sequence[Pattern], documents: np.ndarray, seq_length: int
    ) -> PatternTable:
        """Return the table of patterns.

        Args:
            classes: The classes.
            patterns: Patterns that hold every document once.
            documents: All documents, class by class.
            seq_length: Tokens of a row.
        """
        members = [[slot.document_class for slot in pattern.slots] for pattern in patterns]
        images = np.array([classes.num_images[member].sum() for member in members])
        tokens = np.array([classes.lengths[member].sum() for member in members])
        kinds = images * TOKEN_GROUPS + tokens * TOKEN_GROUPS // (seq_length + 1)
        order = np.argsort(kinds, kind="stable")
        ordered = [patterns[i] for i in order]
        groups, first = np.unique(kinds[order], return_index=True)
        pattern_begins = _begins([pattern.num_rows for pattern in ordered])
        slots = [slot for pattern in ordered for slot in pattern.slots]
        return cls(
            image_counts=groups // TOKEN_GROUPS,
            rows_per_group=np.diff(np.append(pattern_begins[first], pattern_begins[-1])),
            documents=documents,
            class_begins=_begins(classes.counts),
            pattern_begins=pattern_begins,
            slot_begins=_begins([len(pattern.slots) for pattern in ordered]),
            slot_classes=np.array([slot.document_class for slot in slots], dtype=np.int64),
            slot_firsts=np.array([slot.first for slot in slots], dtype=np.int64),
        )

    def pieces(self, rows: np.ndarray, epochs: np.ndarray, seed: int) -> RowPieces:
        """Return what stands in rows. Which documents of a class meet in a row changes from epoch to epoch."""
        pattern = np.searchsorted(self.pattern_begins, rows, side="right") - 1
        begins = self.slot_begins[pattern]
        owner, slot = concatenate_ranges(begins, self.slot_begins[pattern + 1] - begins)
        document_class = self.slot_classes[slot]
        number = self.slot_firsts[slot] + (rows - self.pattern_begins[pattern])[owner]
        first = self.class_begins[document_class]
        key = keyed_hash(seed, Stream.DOCUMENT_ORDER, epochs[owner], document_class)
        number = permute(number, self.class_begins[document_class + 1] - first, key)
        return RowPieces(owner, self.documents[first + number].astype(np.int64))


@dataclass(frozen=True)
class WindowTable(RowTable):
    """Rows cut from the concatenation of all documents (layout ``window``). r rows, d documents."""

    documents: np.ndarray
    """(d,) int32 or int64, all documents in the order in which they are concatenated."""
    row_documents: np.ndarray
    """(r + 1,) int64, position in ``documents`` of the document that each row begins in; the end of all."""
    row_tokens: np.ndarray
    """(r + 1,) int64, token of that document that each row begins with."""
    row_order: np.ndarray
    """(r,) int64, rows group by group."""

    def pieces(self, rows: np.ndarray, epochs: np.ndarray, seed: int) -> RowPieces:
        """Return what stands in rows: the end of one document, whole ones, and the beginning of another."""
        rows = self.row_order[rows]
        first, last = self.row_documents[rows], self.row_documents[rows + 1]
        end_token = self.row_tokens[rows + 1]
        owner, position = concatenate_ranges(first, last - first + (end_token > 0))
        begins = np.where(position == first[owner], self.row_tokens[rows][owner], 0)
        ends = np.where(position == last[owner], end_token[owner], UNLIMITED)
        return RowPieces(owner, self.documents[position].astype(np.int64), begins, ends)


def _begins(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
