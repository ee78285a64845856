"""The endless sequence of rows of one corpus: which row of which epoch stands at a position, and what it holds.

An epoch is every row of the corpus's table once. Rows with many and with few images, full and less full, alternate
evenly, so that any stretch of rows holds its share of images and tokens; which of the rows that hold the same comes
when is a keyed permutation per epoch. Everything is computed where it is asked for: there is no state, and no position
is farther away than another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np

from lcl_megatron.config.errors import require
from lcl_megatron.data.order import Stream, keyed_hash, permute
from lcl_megatron.data.planning.compose import ComposedDocuments, Composer
from lcl_megatron.data.planning.even_order import even_step
from lcl_megatron.data.planning.pairs import PairComposer
from lcl_megatron.data.planning.row_table import RowPieces
from lcl_megatron.data.planning.table_cache import open_table

if TYPE_CHECKING:
    from lcl_megatron.config.run import DataConfig
    from lcl_megatron.data.storage.corpus import Corpus

SAMPLED_ROWS = 8192
"""Rows from which the mean images and tokens of a row are taken, all image counts in their right shares."""
READ_ROWS = 8192
"""Rows that are composed together when a whole epoch is looked at."""
COMPOSERS: dict[str, type[Composer]] = {"interleaved": Composer, "pairs": PairComposer}


@dataclass(frozen=True)
class PlannedRow:
    """One row: documents, or parts of documents, of one epoch of one corpus, in order."""

    index: int
    """Number of the row in the sequence of all rows of the run."""
    epoch: int
    """Epoch of its corpus."""
    documents: np.ndarray
    """(k,) int64, documents as the corpus's composer counts them."""
    source: int = 0
    """Number of the corpus among the run's."""
    begins: np.ndarray | None = None
    """(k,) int64, first token of each document that stands in the row; None = whole documents."""
    ends: np.ndarray | None = None
    """(k,) int64, token behind the last one; beyond the document's end = to its end."""


class LazyRows(Sequence[PlannedRow], ABC):
    """Rows that are made when they are asked for: of the rows of all ranks a process looks at few."""

    @abstractmethod
    def row(self, number: int) -> PlannedRow:
        """Return a row, numbered from 0."""

    @overload
    def __getitem__(self, number: int) -> PlannedRow: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[PlannedRow, ...]: ...
    def __getitem__(self, number: int | slice) -> PlannedRow | tuple[PlannedRow, ...]:
        chosen = range(len(self))[number]
        return self.row(chosen) if isinstance(chosen, int) else tuple(self.row(i) for i in chosen)


class SourceRowBlock(LazyRows):
    """Rows of one corpus.

    Args:
        source: Number of the corpus among the run's.
        indices: (r,) int64, numbers of the rows in the sequence of all rows of the run.
        epochs: (r,) int64.
        pieces: What stands in the rows.
    """

    def __init__(self, source: int, indices: np.ndarray, epochs: np.ndarray, pieces: RowPieces) -> None:
        self._source, self._indices, self._epochs, self._pieces = source, indices, epochs, pieces
        self._borders = np.concatenate([[0], np.cumsum(np.bincount(pieces.owner, minlength=len(indices)))])

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, number: int) -> PlannedRow:
        """Return a row, numbered from 0."""
        part = slice(self._borders[number], self._borders[number + 1])
        pieces = self._pieces
        return PlannedRow(
            index=int(self._indices[number]),
            epoch=int(self._epochs[number]),
            documents=pieces.documents[part],
            source=self._source,
            begins=None if pieces.begins is None else pieces.begins[part],
            ends=None if pieces.ends is None else pieces.ends[part],
        )


@dataclass(frozen=True)
class RowCounts:
    """What each of r rows holds."""

    num_documents: np.ndarray
    """(r,) int64, documents that begin in the row."""
    num_images: np.ndarray
    """(r,) int64."""
    num_targets: np.ndarray
    """(r,) int64, predicted tokens."""
    num_tokens: np.ndarray
    """(r,) int64, tokens of the row's documents."""
    squared_lengths: np.ndarray
    """(r,) int64, sum over the row's documents of length squared."""

    @classmethod
    def join(cls, parts: Sequence[RowCounts], order: np.ndarray) -> RowCounts:
        """Return the counts of several blocks of rows, one behind the other and then in another order."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts])[order] for field in fields(cls)))


@dataclass(frozen=True)
class RowBlock:
    """Some rows, and what each holds."""

    rows: Sequence[PlannedRow]
    """The r rows."""
    counts: RowCounts
    """What each holds."""
    has_context: np.ndarray
    """(images,) bool, whether each image of each row may be contrasted."""


@dataclass(frozen=True)
class EpochStatistics:
    """What one epoch of a corpus holds."""

    documents: int
    """Documents that are trained on."""
    skipped: dict[str, int]
    """Documents that are not, by reason."""
    rows: int
    """Rows."""
    tokens: int
    """Tokens of the documents; ``rows * seq_length`` less padding."""
    images: int
    """Images."""
    pairs: int
    """Images that have a context to be contrasted with."""
    targets: int
    """Predicted tokens."""


class SourceRows:
    """The rows of one corpus.

    Args:
        corpus: The corpus.
        view: What counts as a document: ``interleaved`` or ``pairs``.
        config: Composition and layout.
        num_latents: Latents per image.
        seed: Seed of the run.
        source: Number of the corpus among the run's.

    Raises:
        ConfigError: If no document can be used, a row cannot hold one, or a budget would leave out documents.
    """

    def __init__(
        self, corpus: Corpus, view: str, config: DataConfig, num_latents: int, seed: int, source: int = 0
    ) -> None:
        self.corpus = corpus
        self.composer = COMPOSERS[view](corpus, config, num_latents, seed)
        """Composes the documents."""
        self.source = source
        """Number of the corpus among the run's."""
        built = open_table(self.composer)
        self.table = built.table
        """All rows of an epoch."""
        self.left_out = built.left_out
        """Documents that stand in no row, by reason."""
        # Products of a place and a step must fit 64 bits.
        require(self.num_rows < 1 << 31, f"{corpus.path} gives {self.num_rows} rows; at most 2**31 - 1 can be planned")
        self._seed = seed
        self._step = even_step(self.num_rows)
        self._group_ends = np.cumsum(self.table.rows_per_group)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.table.num_rows

    @cached_property
    def means(self) -> tuple[float, float]:
        """Images and tokens of a row, on average."""
        count = min(SAMPLED_ROWS, self.num_rows)
        counts = self.read(0, count, np.arange(count)).counts
        return float(counts.num_images.mean()), float(counts.num_tokens.mean())

    def read(self, first: int, count: int, indices: np.ndarray) -> RowBlock:
        """Return the rows at the positions [first, first + count) of this corpus's sequence.

        Args:
            first: First position.
            count: Number of rows.
            indices: (count or more,) int64, what the rows are called in the sequence of the whole run.
        """
        epochs, places = np.divmod(np.arange(first, first + count), self.num_rows)
        rows = self._rows(epochs, places)
        pieces = self.table.pieces(rows, epochs, self._seed)
        composed = compose_pieces(self.composer, pieces, epochs[pieces.owner])
        begun = np.ones(len(pieces.owner)) if pieces.begins is None else pieces.begins == 0
        return RowBlock(
            rows=SourceRowBlock(self.source, indices[:count], epochs, pieces),
            counts=RowCounts(
                num_documents=_sums(pieces.owner, begun, count),
                num_images=_sums(pieces.owner, composed.num_images, count),
                num_targets=_sums(pieces.owner, composed.num_targets, count),
                num_tokens=_sums(pieces.owner, composed.lengths, count),
                squared_lengths=_sums(pieces.owner, composed.lengths**2, count),
            ),
            has_context=composed.has_context,
        )

    def statistics(self, epoch: int = 0) -> EpochStatistics:
        """Return what an epoch holds and leaves out. Composes the whole epoch."""
        sums = np.zeros(5, dtype=np.int64)
        for first in range(0, self.num_rows, READ_ROWS):
            count = min(READ_ROWS, self.num_rows - first)
            block = self.read(epoch * self.num_rows + first, count, np.arange(count))
            counts = block.counts
            columns = (counts.num_documents, counts.num_tokens, counts.num_images, counts.num_targets)
            sums += [*(values.sum() for values in columns), block.has_context.sum()]
        documents, tokens, images, targets, pairs = sums.tolist()
        return EpochStatistics(documents, self.left_out, self.num_rows, tokens, images, pairs, targets)

    def _rows(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the table's row at places of epochs."""
        # Rows of a group stand side by side in the table, and like groups too: even steps through it draw from all.
        shift = keyed_hash(self._seed, Stream.ROW_ORDER, epochs) % np.uint64(self.num_rows)
        rows = (places * self._step + shift.astype(np.int64)) % self.num_rows
        groups = np.searchsorted(self._group_ends, rows, side="right")
        sizes = self.table.rows_per_group[groups]
        begins = self._group_ends[groups] - sizes
        keys = keyed_hash(self._seed, Stream.ROW_ORDER, epochs, groups)
        return begins + permute(rows - begins, sizes, keys)


def compose_pieces(composer: Composer, pieces: RowPieces, epochs: np.ndarray) -> ComposedDocuments:
    """Return what the pieces of some rows look like; ``epochs`` is (k,), the epoch of each piece."""
    return composer.compose(pieces.documents, epochs).part(pieces.begins, pieces.ends, composer.num_latents)


def _sums(groups: np.ndarray, values: np.ndarray, num_groups: int) -> np.ndarray:
    return np.bincount(groups, weights=values, minlength=num_groups).astype(np.int64)
