"""Builds row tables: sizes of all documents, then patterns or windows. Memory: a few bytes per document."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from lcl_megatron.config.errors import require
from lcl_megatron.data.order import Stream, keyed_hash, permute
from lcl_megatron.data.planning.compose import WINDOW_SEED, ComposedDocuments, Composer
from lcl_megatron.data.planning.packing import DocumentClasses, one_per_row, pack
from lcl_megatron.data.planning.row_table import PatternTable, RowTable, WindowTable

CHUNK_DOCUMENTS = 1 << 20
"""Documents that are looked at together; bounds the memory of a build."""
WINDOW_DOCUMENTS = 8192
"""Documents that are composed together while windows are cut."""


@dataclass(frozen=True)
class BuiltTable:
    """A table, and what it leaves out."""

    table: RowTable
    """The rows."""
    left_out: dict[str, int]
    """Documents in no row, by reason."""


def build_table(composer: Composer) -> BuiltTable:
    """Return the table of all rows of an epoch.

    Raises:
        ConfigError: If no document is left, or a document fits into no row.
    """
    budget, most = composer.config.max_images_per_row, composer.most_images
    require(
        budget == 0 or composer.config.layout != "packed" or budget >= most,
        f"data.max_images_per_row = {budget} is less than the images of a document, up to {most} with "
        f"data.max_images_per_document = {composer.config.max_images_per_document}: it could fit into no row; raise "
        "the one, lower the other, or set --max-images-per-row 0",
    )
    keys, left_out = _size_keys(composer)
    require(
        any(keys_of_chunk.any() for keys_of_chunk in keys),
        f"none of the {composer.num_documents} documents of {composer.corpus.path} can be used: {left_out} "
        f"(data.min_similarity = {composer.config.min_similarity}, data.seq_length = {composer.config.seq_length})",
    )
    build = _windows if composer.config.layout == "window" else _patterns
    return BuiltTable(build(composer, keys), left_out)


def _size_keys(composer: Composer) -> tuple[list[np.ndarray], dict[str, int]]:
    """Return length and images of every document in one number, per chunk; 0 = left out. And what is left out.

    In layout ``window`` lengths play no part: the number is 1.
    """
    factor = composer.most_images + 1
    is_window = composer.config.layout == "window"
    # The fewest bytes: of all that a build holds, this is the most.
    dtype = np.min_scalar_type(1 if is_window else composer.config.seq_length * factor + factor)

    def measure(begin: int) -> tuple[np.ndarray, dict[str, int]]:
        sizes = composer.sizes(begin, min(composer.num_documents, begin + CHUNK_DOCUMENTS))
        used = sizes.lengths > 0
        composer.corpus.release_pages()
        keys = used if is_window else np.where(used, sizes.lengths * factor + sizes.num_images, 0)
        return keys.astype(dtype), sizes.left_out

    left_out: Counter[str] = Counter()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        chunks = list(pool.map(measure, range(0, composer.num_documents, CHUNK_DOCUMENTS)))
    for _, counts in chunks:
        left_out.update(counts)
    return [keys for keys, _ in chunks], dict(left_out)


def _patterns(composer: Composer, keys: list[np.ndarray]) -> RowTable:
    config = composer.config
    factor = composer.most_images + 1
    counts = np.zeros(config.seq_length * factor + factor, dtype=np.int64)
    for chunk in keys:
        counts += np.bincount(chunk, minlength=len(counts))
    counts[0] = 0
    present = np.flatnonzero(counts)
    classes = DocumentClasses(lengths=present // factor, num_images=present % factor, counts=counts[present])
    if config.layout == "pad":
        patterns = one_per_row(classes)
    else:
        # More than a row can hold is no limit, but would cost as much time as it is large.
        patterns = pack(classes, config.seq_length, min(config.max_images_per_row, config.seq_length // composer.span))
    return PatternTable.of(classes, patterns, _sorted_documents(keys, counts), config.seq_length)


def _sorted_documents(keys: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Return all documents in the order of their keys, in one pass; chunks are sorted, and nothing longer."""
    place = np.cumsum(counts) - counts
    result = np.empty(int(counts.sum()), dtype=_document_dtype(keys))
    for number, chunk in enumerate(keys):
        used = np.flatnonzero(chunk)
        order = np.argsort(chunk[used], kind="stable")
        sorted_keys = chunk[used][order]
        here = np.bincount(sorted_keys, minlength=len(counts))
        before = np.cumsum(here) - here
        targets = np.arange(len(order)) + (place - before)[sorted_keys]
        result[targets] = used[order] + number * CHUNK_DOCUMENTS
        place += here
    return result


def _document_dtype(keys: list[np.ndarray]) -> np.dtype:
    return np.dtype(np.int32 if len(keys) * CHUNK_DOCUMENTS < 1 << 31 else np.int64)


def _windows(composer: Composer, keys: list[np.ndarray]) -> RowTable:
    dtype = _document_dtype(keys)
    used = np.concatenate(
        [(np.flatnonzero(chunk) + number * CHUNK_DOCUMENTS).astype(dtype) for number, chunk in enumerate(keys)]
    )
    key = int(keyed_hash(WINDOW_SEED, Stream.DOCUMENT_ORDER))
    documents = np.empty_like(used)
    for begin in range(0, len(used), CHUNK_DOCUMENTS):
        places = np.arange(begin, min(len(used), begin + CHUNK_DOCUMENTS))
        documents[places] = used[permute(places, len(used), key)]
    cutter = _WindowCutter(composer.config.seq_length, composer.span)
    for begin in range(0, len(documents), WINDOW_DOCUMENTS):
        cutter.add(composer.compose(documents[begin : begin + WINDOW_DOCUMENTS], 0))
    row_documents, row_tokens, images = cutter.finish()
    order = np.argsort(images, kind="stable")
    image_counts, rows_per_group = np.unique(images, return_counts=True)
    return WindowTable(
        image_counts=image_counts.astype(np.int64),
        rows_per_group=rows_per_group.astype(np.int64),
        documents=documents,
        row_documents=row_documents,
        row_tokens=row_tokens,
        row_order=order,
    )


class _WindowCutter:
    """Cuts an endless concatenation of documents into rows; an image that a border would split moves to the next."""

    def __init__(self, seq_length: int, span: int) -> None:
        self._seq_length = seq_length
        self._span = span
        self._end = 0
        self._num_documents = 0
        self._row_begin = 0
        """Position, in the concatenation, of the row that is not finished."""
        self._row_images = 0
        """Its images so far."""
        self._documents = [np.zeros(1, dtype=np.int64)]
        self._tokens = [np.zeros(1, dtype=np.int64)]
        self._images: list[np.ndarray] = []

    def add(self, composed: ComposedDocuments) -> None:
        """Append some documents."""
        begins = self._end + np.cumsum(composed.lengths) - composed.lengths
        owner = np.repeat(np.arange(len(begins)), composed.num_images)
        images = begins[owner] + composed.image_positions
        self._end += int(composed.lengths.sum())
        rows, counts = self._cut(images)
        document = np.searchsorted(begins, rows, side="right") - 1
        self._documents.append(document + self._num_documents)
        self._tokens.append(rows - begins[document])
        self._images.append(counts)
        self._num_documents += len(begins)

    def finish(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return document and token of every row's begin and of the end, and images of every row."""
        documents = np.concatenate([*self._documents, [self._num_documents]])
        tokens = np.concatenate([*self._tokens, [0]])
        return documents, tokens, np.concatenate([*self._images, [self._row_images]])

    def _cut(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where new rows begin, and the images of the rows that end there, given the positions of new images."""
        rows, counts = [], []
        first = 0
        while self._row_begin + self._seq_length < self._end:
            border = self._row_begin + self._seq_length
            last = int(np.searchsorted(images, border))
            if last and images[last - 1] + self._span > border:
                last -= 1
                border = int(images[last])
            rows.append(border)
            counts.append(self._row_images + last - first)
            self._row_begin, self._row_images, first = border, 0, last
        self._row_images += len(images) - first
        return np.array(rows, dtype=np.int64), np.array(counts, dtype=np.int64)
