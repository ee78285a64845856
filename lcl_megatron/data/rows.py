"""The endless sequence of packed rows that a run reads: a pure function of (corpus, configuration, seed).

An epoch is a keyed permutation of the documents that have images, cut into windows. The documents of a window are
composed and packed into rows, and the rows shuffled. Epoch follows epoch. Nothing is materialised but the window in
hand and the number of rows in each window before it.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from lcl_megatron.config.errors import ConfigError, require
from lcl_megatron.data.compose import Composer, concatenate_ranges
from lcl_megatron.data.order import Permutation, Stream, keyed_hash
from lcl_megatron.data.packing import pack_documents

if TYPE_CHECKING:
    from lcl_megatron.config.run import DataConfig
    from lcl_megatron.data.corpus import Corpus

ORDER_FIELDS = (
    "seq_length",
    "min_similarity",
    "max_images_per_document",
    "packing_window",
    "max_images_per_row",
)
"""Fields of ``DataConfig`` that decide what the rows are."""
NO_SIMILAR_IMAGE = "no image of sufficient similarity"
IMAGES_CUT_OFF = "all images behind the cut at seq_length"
CACHED_WINDOWS = 4
"""Packed windows that are kept; steps are read in order, and a global batch seldom reaches over more."""


@dataclass(frozen=True)
class PlannedRow:
    """One row: whole documents of one epoch, in order."""

    index: int
    """Number of the row in the sequence of all rows."""
    epoch: int
    """Epoch of its documents."""
    documents: np.ndarray
    """(k,) int64, indices in the corpus."""


@dataclass(frozen=True)
class RowCounts:
    """What each of r rows holds."""

    num_images: np.ndarray
    """(r,) int64."""
    num_targets: np.ndarray
    """(r,) int64, predicted tokens."""
    num_tokens: np.ndarray
    """(r,) int64, tokens of the row's documents."""
    squared_lengths: np.ndarray
    """(r,) int64, sum over the row's documents of length squared."""

    def part(self, begin: int, end: int) -> RowCounts:
        """Return the counts of the rows [begin, end)."""
        return RowCounts(*(getattr(self, field.name)[begin:end] for field in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[RowCounts]) -> RowCounts:
        """Return the counts of several ranges of rows, one behind the other."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class RowBlock:
    """Some consecutive rows."""

    rows: tuple[PlannedRow, ...]
    """The r rows."""
    counts: RowCounts
    """What each holds."""
    has_context: np.ndarray
    """(images,) bool, whether each image of each row may be contrasted."""


@dataclass(frozen=True)
class WindowStart:
    """Where a window begins in the sequence of rows: lets a run go on there without packing what lies before."""

    window: int
    """Number of the window, over all epochs."""
    row: int
    """Its first row."""


@dataclass(frozen=True)
class EpochStatistics:
    """What one epoch holds."""

    documents: int
    """Documents that are trained on."""
    skipped: dict[str, int]
    """Documents that are not, by reason."""
    rows: int
    """Packed rows."""
    tokens: int
    """Tokens of the documents; ``rows * seq_length`` less padding."""
    images: int
    """Images."""
    pairs: int
    """Images that have a context to be contrasted with."""
    targets: int
    """Predicted tokens."""


class RowSequence:
    """The rows of a run.

    Args:
        corpus: The corpus.
        config: Composition and packing.
        num_latents: Latents per image.
        seed: Seed of the run.
        start: Saves a resumed run the packing of all earlier windows; see ``window_start``. Rows before it are
            still found, slowly.

    Raises:
        ConfigError: If no document has an image, a row cannot hold one, or a budget would leave out documents.
    """

    def __init__(
        self, corpus: Corpus, config: DataConfig, num_latents: int, seed: int, start: WindowStart | None = None
    ) -> None:
        budget, most = config.max_images_per_row, config.max_images_per_document
        require(
            budget == 0 or budget >= most,
            f"data.max_images_per_row = {budget} is less than data.max_images_per_document = {most}: a document "
            "could fit into no row; raise the one, lower the other, or set --max-images-per-row 0",
        )
        self.corpus = corpus
        self.config = config
        self.seed = seed
        self.composer = Composer(corpus, config, num_latents, seed)
        """Composes the documents."""
        self.documents = self.composer.documents_with_images()
        """Documents with an image of sufficient similarity."""
        if not len(self.documents):
            raise ConfigError(
                f"none of the corpus's {corpus.num_documents} documents has an image with similarity >= "
                f"data.min_similarity = {config.min_similarity}; lower --min-similarity or check the corpus"
            )
        self.windows_per_epoch = max(1, len(self.documents) // config.packing_window)
        """An epoch's documents are cut into so many windows of at least ``packing_window``, as even as can be."""
        self._start = start or WindowStart(0, 0)
        self._first_rows = [self._start.row]
        self._cache: OrderedDict[int, _Window] = OrderedDict()

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that decides the sequence: only under an equal one do consumed rows mean the same."""
        settings = [(name, getattr(self.config, name)) for name in ORDER_FIELDS]
        parts = (self.corpus.fingerprint, self.seed, self.composer.num_latents, settings)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def read(self, first_row: int, num_rows: int) -> RowBlock:
        """Return the rows [first_row, first_row + num_rows)."""
        parts = list(self._parts(first_row, num_rows))
        planned = (row for window, begin, end in parts for row in window.rows(begin, end))
        rows = tuple(PlannedRow(first_row + i, epoch, documents) for i, (epoch, documents) in enumerate(planned))
        return RowBlock(
            rows=rows,
            counts=RowCounts.join([window.counts.part(begin, end) for window, begin, end in parts]),
            has_context=np.concatenate([window.context(begin, end) for window, begin, end in parts]),
        )

    def window_start(self, row: int) -> WindowStart:
        """Return the start of the window that holds a row: what ``start`` takes when a run resumes at that row."""
        window = self._find(row)
        return WindowStart(window, self._first_rows[window - self._start.window])

    def num_rows_per_epoch(self, epoch: int = 0) -> int:
        """Return the rows of an epoch, which differ a little between epochs. Packs the whole epoch."""
        return self.statistics(epoch).rows

    def statistics(self, epoch: int = 0) -> EpochStatistics:
        """Return what an epoch holds and leaves out. Packs the whole epoch."""
        count: Counter[str] = Counter()
        for number in range(epoch * self.windows_per_epoch, (epoch + 1) * self.windows_per_epoch):
            window = self._window(number)
            count["documents"] += len(window.documents)
            count["rows"] += window.num_rows
            count["tokens"] += int(window.counts.num_tokens.sum())
            count["images"] += int(window.counts.num_images.sum())
            count["pairs"] += int(window.has_context.sum())
            count["targets"] += int(window.counts.num_targets.sum())
        skipped = {
            NO_SIMILAR_IMAGE: self.corpus.num_documents - len(self.documents),
            IMAGES_CUT_OFF: len(self.documents) - count["documents"],
        }
        names = ("documents", "rows", "tokens", "images", "pairs", "targets")
        return EpochStatistics(skipped=skipped, **{name: count[name] for name in names})

    def __getstate__(self) -> dict[str, Any]:
        """Leave cached windows behind when the sequence goes to a worker process."""
        return self.__dict__ | {"_cache": OrderedDict()}

    def _parts(self, first_row: int, num_rows: int) -> Iterator[tuple[_Window, int, int]]:
        """Yield (window, begin, end), ranges of rows of windows that together are the rows asked for."""
        number = self._find(first_row)
        begin = first_row - self._first_rows[number - self._start.window]
        while num_rows:
            window = self._window(number)
            end = min(window.num_rows, begin + num_rows)
            yield window, begin, end
            num_rows, begin, number = num_rows - (end - begin), 0, number + 1

    def _find(self, row: int) -> int:
        """Return the window of a row; packs the windows before it whose number of rows is not known yet."""
        if row < 0:
            raise IndexError(f"row {row} was asked for; rows are numbered from 0")
        if row < self._start.row:
            self._start, self._first_rows = WindowStart(0, 0), [0]
        firsts, epoch = self._first_rows, self.windows_per_epoch
        while firsts[-1] <= row:
            window = self._window(self._start.window + len(firsts) - 1)
            firsts.append(firsts[-1] + window.num_rows)
            if len(firsts) > epoch and firsts[-1] == firsts[-1 - epoch]:
                raise ConfigError(
                    f"a whole epoch of {len(self.documents)} documents gave no row: {IMAGES_CUT_OFF} = "
                    f"{self.config.seq_length}; raise --seq-length"
                )
        return self._start.window + bisect.bisect_right(firsts, row) - 1

    def _window(self, number: int) -> _Window:
        """Return a window, numbered over all epochs, from the cache if it was used lately."""
        window = self._cache.pop(number, None) or self._pack(*divmod(number, self.windows_per_epoch))
        self._cache[number] = window
        if len(self._cache) > CACHED_WINDOWS:
            self._cache.popitem(last=False)
        return window

    def _pack(self, epoch: int, window: int) -> _Window:
        """Compose and pack the documents of one window."""
        total = len(self.documents)
        begin, end = (total * i // self.windows_per_epoch for i in (window, window + 1))
        order = Permutation(total, int(keyed_hash(self.seed, Stream.DOCUMENT_ORDER, epoch)))
        composed = self.composer.compose(self.documents[order(np.arange(begin, end))], epoch)
        used = np.flatnonzero(composed.num_images)
        images, lengths = composed.num_images[used], composed.lengths[used]
        packed = pack_documents(lengths, self.config.seq_length, images, self.config.max_images_per_row)
        num_rows = int(packed.max(initial=-1)) + 1
        # Packing puts the longest documents into the first rows; training must not see them in that order.
        key = keyed_hash(self.seed, Stream.ROW_ORDER, epoch, window, np.arange(num_rows))
        row = np.argsort(np.argsort(key, kind="stable"), kind="stable")[packed]
        by_row = np.argsort(row, kind="stable")
        _, context = concatenate_ranges(composed.image_offsets[used[by_row]], images[by_row])
        return _Window(
            epoch=epoch,
            documents=composed.documents[used[by_row]],
            offsets=_offsets(np.bincount(row, minlength=num_rows)),
            counts=RowCounts(
                num_images=_sums(row, images, num_rows),
                num_targets=_sums(row, composed.num_targets[used], num_rows),
                num_tokens=_sums(row, lengths, num_rows),
                squared_lengths=_sums(row, lengths**2, num_rows),
            ),
            has_context=composed.has_context[context],
        )


@dataclass(frozen=True)
class _Window:
    """Packed documents of one window, row after row."""

    epoch: int
    documents: np.ndarray
    """(n,) int64, indices in the corpus."""
    offsets: np.ndarray
    """(rows + 1,) int64, first document of each row."""
    counts: RowCounts
    has_context: np.ndarray
    """(images,) bool."""

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def rows(self, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield epoch and documents of some rows."""
        for row in range(begin, end):
            yield self.epoch, self.documents[self.offsets[row] : self.offsets[row + 1]]

    def context(self, begin: int, end: int) -> np.ndarray:
        """Return ``has_context`` of the images of some rows."""
        images = self.counts.num_images
        first = int(images[:begin].sum())
        return self.has_context[first : first + int(images[begin:end].sum())]


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])


def _sums(groups: np.ndarray, values: np.ndarray, num_groups: int) -> np.ndarray:
    return np.bincount(groups, weights=values, minlength=num_groups).astype(np.int64)
