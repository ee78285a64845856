"""What a corpus holds, counted in one pass over its memory-mapped side arrays and one over its rejects.

Memory does not grow with the corpus: documents are taken ``CHUNK`` at a time, and only counts are kept. No image and
no token is read.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lcl_megatron.data.pages.histogram import Histogram
from lcl_megatron.data.storage.corpus import Corpus

CHUNK = 1 << 17
"""Documents that are looked at at a time; MMC4 has about 35 text segments in each."""
SIMILARITY_EDGES = np.linspace(0, 1, 101)
"""Similarities outside fall into the first and the last bin."""
SIDE_EDGES = 2.0 ** np.arange(3, 14.01, 0.25)
"""Pixels; sides outside fall into the first and the last bin."""
ASPECT_EDGES = 2.0 ** np.arange(-3, 3.01, 0.125)
"""Width / height; shapes outside fall into the first and the last bin."""
MAX_HASHES = 4_000_000
"""Images whose hashes are compared; of a larger corpus, those in a part of the range of hashes."""
EXAMPLES_PER_REASON = 3
MAX_REASONS = 100
"""Reasons are few fixed phrases; more of them, as in a damaged file, are counted as one."""
OTHER_REASONS = "(other reasons)"


@dataclass
class ImageStatistics:
    """Counts over all images."""

    similarity: np.ndarray = field(default_factory=lambda: np.zeros(len(SIMILARITY_EDGES) - 1, dtype=np.int64))
    """Images per bin of ``SIMILARITY_EDGES``; not a number is in none."""
    similarity_of_one: int = 0
    """Images with similarity 1, which is also what images get whose source gives none."""
    similar: int = 0
    """Images with at least the asked similarity."""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((len(SIDE_EDGES) - 1,) * 2, dtype=np.int64))
    """Images per bin of width and height (``SIDE_EDGES``)."""
    aspect: np.ndarray = field(default_factory=lambda: np.zeros(len(ASPECT_EDGES) - 1, dtype=np.int64))
    """Images per bin of ``ASPECT_EDGES``."""
    extreme_aspect: int = 0
    """Images whose longer side is more than 3 times the shorter one."""
    short_side: Histogram = field(default_factory=Histogram)
    """Shorter side, pixels."""
    bytes: Histogram = field(default_factory=Histogram)
    """Size of the encoded image."""
    unknown_size: int = 0
    """Images whose header gave no size; they are in no figure of sizes."""


@dataclass(frozen=True)
class Duplicates:
    """Equal images, found by their hashes."""

    compared: int
    """Images whose hashes were compared."""
    distinct: int
    """Different hashes among them."""
    is_sample: bool
    """Whether only a part of the range of hashes was looked at. All copies of an image are in it, or none."""
    copies: Histogram
    """How often each distinct image occurs."""
    most_frequent: tuple[tuple[int, int], ...]
    """(first image of the corpus, occurrences) of the most frequent ones, in order."""


@dataclass
class RejectReason:
    """Everything that was left out for one reason."""

    what: str
    """``document`` or ``image``."""
    reason: str
    """The reason."""
    count: int = 0
    """How often."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Random lines of ``rejects.jsonl``."""


@dataclass(frozen=True)
class CorpusStatistics:
    """What a corpus holds."""

    min_similarity: float
    """Similarity that an image must have to be similar."""
    source_documents: np.ndarray
    """(sources,) int64, documents of each source of the manifest."""
    document_tokens: Histogram
    """Text tokens of each document."""
    segment_tokens: Histogram
    """Tokens of each text segment."""
    document_images: Histogram
    """Images of each document."""
    similar_documents: int
    """Documents with a similar image."""
    images: ImageStatistics
    """Counts over all images."""
    duplicates: Duplicates
    """Equal images; None for a corpus without hashes of its images."""
    rejects: tuple[RejectReason, ...]
    """What was left out, the most frequent reason first."""


def read_statistics(corpus: Corpus, min_similarity: float) -> CorpusStatistics:
    """Count what a corpus holds.

    Args:
        corpus: The corpus.
        min_similarity: Similarity that an image must have to be shown in training.
    """
    sources = np.zeros(len(corpus.manifest["sources"]), dtype=np.int64)
    document_tokens, segment_tokens, document_images, images = Histogram(), Histogram(), Histogram(), ImageStatistics()
    similar_documents = 0
    for begin in range(0, corpus.num_documents, CHUNK):
        chunk = slice(begin, begin + CHUNK)
        sources += np.bincount(corpus.document_sources[chunk, 0], minlength=len(sources))
        borders = np.asarray(corpus.document_segments[begin : begin + CHUNK + 1])
        lengths = np.asarray(corpus.segment_lengths[borders[0] : borders[-1]])
        segment_tokens.add(lengths)
        document_tokens.add(_sums(lengths, borders))
        borders = np.asarray(corpus.document_images[begin : begin + CHUNK + 1])
        document_images.add(np.diff(borders))
        good = _add_images(images, corpus, slice(int(borders[0]), int(borders[-1])), min_similarity)
        similar_documents += int(np.count_nonzero(_sums(good, borders)))
        corpus.release_pages()
    return CorpusStatistics(
        min_similarity=min_similarity,
        source_documents=sources,
        document_tokens=document_tokens,
        segment_tokens=segment_tokens,
        document_images=document_images,
        similar_documents=similar_documents,
        images=images,
        duplicates=_find_duplicates(corpus),
        rejects=read_rejects(corpus.path / "rejects.jsonl"),
    )


def read_rejects(path: Path) -> tuple[RejectReason, ...]:
    """Count the reasons of a ``rejects.jsonl``, and keep a few lines of each, every line with equal probability."""
    reasons: dict[tuple[str, str], RejectReason] = {}
    rng = random.Random(0)
    with open(path, encoding="ascii") as stream:
        for line in stream:
            record = json.loads(line)
            key = ("image" if "image" in record else "document", str(record["reason"]))
            if key not in reasons and len(reasons) >= MAX_REASONS:
                key = (key[0], OTHER_REASONS)
            reason = reasons.setdefault(key, RejectReason(*key))
            reason.count += 1
            place = int(rng.random() * reason.count)  # reservoir sampling (Vitter 1985, algorithm R)
            if len(reason.examples) < EXAMPLES_PER_REASON:
                reason.examples.append(record)
            elif place < EXAMPLES_PER_REASON:
                reason.examples[place] = record
    return tuple(sorted(reasons.values(), key=lambda reason: (-reason.count, reason.what, reason.reason)))


def _add_images(statistics: ImageStatistics, corpus: Corpus, images: slice, min_similarity: float) -> np.ndarray:
    """Count some images; return which are similar, by the same comparison as when rows are composed."""
    similarity = np.asarray(corpus.image_similarity[images])
    good = similarity >= min_similarity
    statistics.similar += int(np.count_nonzero(good))
    statistics.similarity_of_one += int(np.count_nonzero(similarity == 1))
    known = similarity[~np.isnan(similarity)].astype(np.float64)
    statistics.similarity += np.histogram(np.clip(known, 0, 1), SIMILARITY_EDGES)[0]
    statistics.bytes.add(np.asarray(corpus.image_lengths[images]))

    width, height = np.asarray(corpus.image_width[images]), np.asarray(corpus.image_height[images])
    measured = (width > 0) & (height > 0)
    statistics.unknown_size += int(np.count_nonzero(~measured))
    width, height = width[measured].astype(np.int64), height[measured].astype(np.int64)
    statistics.short_side.add(np.minimum(width, height))
    statistics.extreme_aspect += int(np.count_nonzero((width > 3 * height) | (height > 3 * width)))
    statistics.aspect += np.histogram(np.clip(width / height, ASPECT_EDGES[0], ASPECT_EDGES[-1]), ASPECT_EDGES)[0]
    wide, high = (np.clip(side, SIDE_EDGES[0], SIDE_EDGES[-1]) for side in (width, height))
    statistics.sizes += np.histogram2d(wide, high, bins=[SIDE_EDGES, SIDE_EDGES])[0].astype(np.int64)
    return good


def _find_duplicates(corpus: Corpus) -> Duplicates:
    """Compare the images' hashes, of a large corpus those below a limit: a fair sample, with all copies of an image."""
    parts = -(-corpus.num_images // MAX_HASHES)
    found = _OccurrenceCount()
    for begin in range(0, corpus.num_images, MAX_HASHES):
        chunk = np.asarray(corpus.image_hash[begin : begin + MAX_HASHES])
        index = np.flatnonzero(chunk < np.uint64((1 << 64) // parts)) if parts > 1 else np.arange(len(chunk))
        found.add(chunk[index], begin + index)
    _, first, counts = found.result()
    copies = Histogram()
    copies.add(counts)
    top = np.argsort(-counts, kind="stable")[:8]
    return Duplicates(
        compared=int(counts.sum()),
        distinct=len(counts),
        is_sample=parts > 1,
        copies=copies,
        most_frequent=tuple((int(first[i]), int(counts[i])) for i in top if counts[i] > 1),
    )


class _OccurrenceCount:
    """Counts how often each key occurs; holds distinct keys, and a buffer."""

    def __init__(self) -> None:
        self._keys = [np.zeros(0, dtype=np.uint64)]
        self._first = [np.zeros(0, dtype=np.int64)]
        self._counts = [np.zeros(0, dtype=np.int64)]

    def add(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Count keys; ``places`` (ascending over all calls) says where each was found."""
        self._keys.append(keys)
        self._first.append(places)
        self._counts.append(np.ones(len(keys), dtype=np.int64))
        if sum(map(len, self._keys[1:])) > MAX_HASHES:
            self.result()

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the distinct keys, where each was found first, and how often it was found."""
        keys, first, inverse = np.unique(np.concatenate(self._keys), return_index=True, return_inverse=True)
        counts = np.bincount(inverse, weights=np.concatenate(self._counts), minlength=len(keys)).astype(np.int64)
        places = np.concatenate(self._first)[first]
        self._keys, self._first, self._counts = [keys], [places], [counts]
        return keys, places, counts


def _sums(values: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Return the sum of ``values[borders[i] - borders[0] : borders[i + 1] - borders[0]]`` for every i, int64."""
    running = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(running[borders - borders[0]])
