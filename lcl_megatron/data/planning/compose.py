"""Which images of a document are shown, where they stand, and where its tail is cut: one epoch's view of it.

The rules are those of the LCL paper (arXiv:2406.07543) for MMC4; inline images are those of OBELICS-like corpora:

1. keep images whose similarity to their sentence is high enough;
2. of several images matched to one sentence keep a random one;
3. keep a random choice of at most so many images;
4. put a matched image before or after its sentence with probability 1/2 each; an inline image stays in its place;
5. ``BOS, text and images in order, EOS``, an image being ``BoI, L x image, EoI``;
6. cut the tail at the row's length, text segments and images whole; EOS stays.

Everything is a pure function of (seed, epoch, document) and of the corpus's small side arrays. Lengths, images and
targets of thousands of documents are computed at once without a look at their tokens; tokens are read only when a row
is made. How long a document is, and how many images it has, is the same in every epoch unless its tail is cut; so
rows can be packed once for all epochs (``Composer.sizes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lcl_megatron.config.errors import require
from lcl_megatron.data.document import ImageKind
from lcl_megatron.data.order import Stream, keyed_hash
from lcl_megatron.data.storage.indexed_file import CorpusError

if TYPE_CHECKING:
    from lcl_megatron.config.run import DataConfig
    from lcl_megatron.data.storage.corpus import Corpus

NO_SIMILAR_IMAGE = "no image of sufficient similarity"
IMAGES_CUT_OFF = "all images behind the cut at seq_length"
TOO_MANY_IMAGES = "more images than max_images_per_document"
UNLIMITED = 1 << 60
"""Length at which the tail is cut where it is not: in layout ``window`` a document goes on in the next row."""
WINDOW_SEED = 0
"""Seed and epoch of all choices in layout ``window``, whose rows are cut once for all runs and epochs."""


@dataclass(frozen=True)
class DocumentSizes:
    """What n documents need of a row, in any epoch."""

    lengths: np.ndarray
    """(n,) int64, most tokens, with BOS, EOS and images; 0 = the document is left out."""
    num_images: np.ndarray
    """(n,) int64, most images; less only in a document whose tail is cut."""
    left_out: dict[str, int]
    """Documents that are left out, by the first reason that applies."""

    @classmethod
    def of(cls, lengths: np.ndarray, num_images: np.ndarray, reasons: dict[str, np.ndarray]) -> DocumentSizes:
        """Return the sizes of documents, some of which are left out: (n,) bool by reason."""
        left_out = np.zeros(len(lengths), dtype=bool)
        counts = {}
        for reason, applies in reasons.items():
            counts[reason] = int((applies & ~left_out).sum())
            left_out |= applies
        return cls(np.where(left_out, 0, lengths), num_images, counts)


@dataclass(frozen=True)
class ComposedDocuments:
    """What some documents look like in their epoch. n documents, k images, in order of document and position."""

    documents: np.ndarray
    """(n,) int64, what was composed: index of a document in the corpus, or of an image in the view ``pairs``."""
    epochs: np.ndarray
    """(n,) int64."""
    lengths: np.ndarray
    """(n,) int64, tokens with BOS, EOS and images."""
    first_segments: np.ndarray
    """(n,) int64, first text segment, numbered over the whole corpus."""
    num_segments: np.ndarray
    """(n,) int64, text segments that remain, from the first on."""
    num_targets: np.ndarray
    """(n,) int64, positions whose next token is predicted: every text token, <BoI> and EOS is a next token once."""
    image_offsets: np.ndarray
    """(n + 1,) int64, first image of each document in the arrays below."""
    images: np.ndarray
    """(k,) int64, index in the corpus."""
    image_positions: np.ndarray
    """(k,) int64, position of <BoI> in the document."""
    has_context: np.ndarray
    """(k,) bool, whether the image may be contrasted with what precedes it."""

    @property
    def num_images(self) -> np.ndarray:
        """(n,) int64, images of each document."""
        return np.diff(self.image_offsets)

    @classmethod
    def join(cls, parts: Sequence[ComposedDocuments], order: np.ndarray) -> ComposedDocuments:
        """Return several results, one behind the other and then in another order, (n,) positions."""
        per_document = {
            name: np.concatenate([getattr(part, name) for part in parts])[order]
            for name in ("documents", "epochs", "lengths", "first_segments", "num_segments", "num_targets")
        }
        counts = np.concatenate([part.num_images for part in parts])
        _, chosen = concatenate_ranges((np.cumsum(counts) - counts)[order], counts[order])
        per_image = {
            name: np.concatenate([getattr(part, name) for part in parts])[chosen]
            for name in ("images", "image_positions", "has_context")
        }
        return cls(**per_document, **per_image, image_offsets=np.concatenate([[0], np.cumsum(counts[order])]))

    def part(self, begins: np.ndarray | None, ends: np.ndarray | None, num_latents: int) -> ComposedDocuments:
        """Return what stands in a row that holds only the tokens [begin, end) of each document, (n,) int64 each.

        None = whole documents; an end behind the document's is its end.
        No image is cut: the border of a row never goes through one. An image whose context stands in another row is
        not contrasted.
        """
        if begins is None or ends is None:
            return self
        ends = np.minimum(ends, self.lengths)
        owner = np.repeat(np.arange(len(self.documents)), self.num_images)
        kept = (begins[owner] <= self.image_positions) & (self.image_positions < ends[owner])
        owner, positions = owner[kept], (self.image_positions - begins[owner])[kept]
        counts = np.bincount(owner, minlength=len(self.documents))
        return replace(
            self,
            lengths=ends - begins,
            # Of what follows the first token, all but latents and <EoI> is predicted.
            num_targets=ends - begins - 1 - counts * (num_latents + 1),
            image_offsets=np.concatenate([[0], np.cumsum(counts)]),
            images=self.images[kept],
            image_positions=positions,
            has_context=np.where(begins[owner] > 0, positions > 0, self.has_context[kept]),
        )


class Composer:
    """Composes documents of a corpus, each as its source wrote it (view ``interleaved``).

    Args:
        corpus: The corpus, or anything with its side arrays and ``segment_tokens``.
        config: Length of a row and the rules' numbers.
        num_latents: Latents L per image.
        seed: Seed of the run.

    Raises:
        ConfigError: If a row cannot hold an image.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, num_latents: int, seed: int) -> None:
        shortest = num_latents + 4
        require(
            config.seq_length >= shortest,
            f"data.seq_length = {config.seq_length} cannot hold a document with an image: BOS, <BoI>, {num_latents} "
            f"latents, <EoI> and EOS are {shortest} tokens; raise --seq-length, or choose a smaller image or a "
            "larger patch",
        )
        self.corpus = corpus
        self.config = config
        self.num_latents = num_latents
        """L."""
        self.seed = seed
        """Seed of the run."""
        self.span = num_latents + 2
        """Tokens of an image: ``<BoI>``, the latents, ``<EoI>``."""
        self.max_length = UNLIMITED if config.layout == "window" else config.seq_length
        """Tokens at which a document's tail is cut."""

    @property
    def num_documents(self) -> int:
        """How many documents there are to compose, those that are left out included."""
        return self.corpus.num_documents

    @property
    def most_images(self) -> int:
        """Images that a document can show at most, by the rules and by the length of a row."""
        return min(self.config.max_images_per_document, (self.max_length - 2) // self.span)

    def document_source(self, document: int) -> str:
        """Return where what is composed comes from."""
        return self.corpus.document_source(document)

    def sizes(self, begin: int, end: int) -> DocumentSizes:
        """Return what the documents [begin, end) need of a row, in any epoch."""
        corpus = self.corpus
        borders = np.asarray(corpus.document_segments[begin : end + 1])
        text_begins = corpus.text_tokens_before(borders)
        first, last = (int(corpus.document_images[i]) for i in (begin, end))
        owner = np.repeat(np.arange(end - begin), np.diff(corpus.document_images[begin : end + 1]))
        good = np.flatnonzero(np.asarray(corpus.image_similarity[first:last]) >= self.config.min_similarity)
        owner, segment = owner[good], np.asarray(corpus.image_segment[first:last])[good]
        matched = np.asarray(corpus.image_kind[first:last])[good] == int(ImageKind.MATCHED)
        num_good = np.bincount(owner, minlength=end - begin)
        # Images stand in order of their segments: of those matched to one sentence only one is shown.
        pair = owner[matched].astype(np.int64) << 32 | segment[matched]
        distinct = np.diff(pair, prepend=-1) != 0
        count = np.bincount(owner[matched][distinct], minlength=end - begin)
        count += np.bincount(owner[~matched], minlength=end - begin)
        num_images = np.minimum(count, self.config.max_images_per_document)
        lengths = 2 + np.diff(text_begins) + num_images * self.span
        reasons = {NO_SIMILAR_IMAGE: count == 0}
        if self.config.too_many_images == "skip":
            reasons[TOO_MANY_IMAGES] = num_good > self.config.max_images_per_document
        if (lengths > self.max_length).any():
            before = corpus.text_tokens_before(borders[owner] + segment) - text_begins[owner]
            can_stand = owner[1 + before + self.span < self.max_length]
            reasons[IMAGES_CUT_OFF] = np.bincount(can_stand, minlength=end - begin) == 0
        lengths, num_images = np.minimum(lengths, self.max_length), np.minimum(num_images, self.most_images)
        return DocumentSizes.of(lengths, num_images, reasons)

    def compose(self, documents: np.ndarray, epochs: np.ndarray | int) -> ComposedDocuments:
        """Return lengths, images and targets of documents; no token is read.

        Args:
            documents: (n,) indices in the corpus.
            epochs: Epoch of each, (n,), or of all.
        """
        documents = np.asarray(documents, dtype=np.int64)
        epochs = np.broadcast_to(np.asarray(epochs, dtype=np.int64), documents.shape)
        slots = _Slots.of(self.corpus, documents)
        owner, images, slot = self._choose_images(documents, epochs, slots)
        first_image = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(documents)))])
        rank = np.arange(len(images)) - first_image[owner]
        text_before = slots.text_before(owner, slot)
        positions = 1 + text_before + rank * self.span
        kept = positions + self.span < self.max_length  # EOS takes the last position
        counts = np.bincount(owner[kept], minlength=len(documents))
        texts, segments = self._cut_tails(slots, slot, first_image)
        has_context = (rank > 0) | (text_before > 0) if self.config.context_rule == "content" else positions > 0
        return ComposedDocuments(
            documents=documents,
            epochs=epochs,
            lengths=2 + texts + counts * self.span,
            first_segments=slots.first_segments,
            num_segments=segments,
            num_targets=texts + counts + 1,
            image_offsets=np.concatenate([[0], np.cumsum(counts)]),
            images=images[kept],
            image_positions=positions[kept],
            has_context=has_context[kept],
        )

    def tokens(self, composed: ComposedDocuments, index: int) -> np.ndarray:
        """Return the tokens of one composed document, (length,) int64.

        Raises:
            CorpusError: If its text is not as long as the corpus's side arrays say.
        """
        special = self.corpus.special_tokens
        tokens = np.full(int(composed.lengths[index]), special.image, dtype=np.int64)
        is_text = np.ones(len(tokens), dtype=bool)
        is_text[0] = is_text[-1] = False
        for begin in composed.image_positions[composed.image_offsets[index] : composed.image_offsets[index + 1]]:
            is_text[begin : begin + self.span] = False
            tokens[begin], tokens[begin + self.span - 1] = special.boi, special.eoi
        tokens[0], tokens[-1] = special.bos, special.eos
        first = int(composed.first_segments[index])
        pieces = [self.corpus.segment_tokens(first + i) for i in range(int(composed.num_segments[index]))]
        text = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
        if len(text) != np.count_nonzero(is_text):
            raise CorpusError(
                f"{self.corpus.path}: the {len(pieces)} segments from {first} on hold {len(text)} tokens, the side "
                f"arrays announce {np.count_nonzero(is_text)}: the corpus is damaged; preprocess it again"
            )
        tokens[is_text] = text
        return tokens

    def _cut_tails(
        self, slots: _Slots, image_slots: np.ndarray, first_image: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the text tokens and text segments, (n,) int64 each, that remain of every document.

        Args:
            slots: The documents' slots.
            image_slots: (images,) slot of each image, ascending.
            first_image: (n + 1,) first image of each document.
        """
        texts = slots.text_before(np.arange(len(slots.first_segments)), slots.offsets[1:] - 1)
        segments = np.diff(slots.offsets) - 1
        cut = np.flatnonzero(2 + texts + np.diff(first_image) * self.span > self.max_length)
        if len(cut):
            owner, slot = concatenate_ranges(slots.offsets[cut], segments[cut])
            images_before = np.searchsorted(image_slots, slot, side="right") - first_image[cut][owner]
            fits = 1 + slots.text_before(cut[owner], slot + 1) + images_before * self.span < self.max_length
            segments[cut] = np.bincount(owner[fits], minlength=len(cut))
            texts[cut] = slots.text_before(cut, slots.offsets[cut] + segments[cut])
        return texts, segments

    def _choose_images(
        self, documents: np.ndarray, epochs: np.ndarray, slots: _Slots
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return position in ``documents``, index in the corpus and slot of the chosen images, in order of standing."""
        corpus, config = self.corpus, self.config
        offsets = np.asarray(corpus.document_images)
        owner, images = concatenate_ranges(offsets[documents], offsets[documents + 1] - offsets[documents])
        good = np.asarray(corpus.image_similarity)[images] >= config.min_similarity
        owner, images = owner[good], images[good]
        matched = np.asarray(corpus.image_kind)[images] == int(ImageKind.MATCHED)
        segment = slots.offsets[owner] + np.asarray(corpus.image_segment)[images]
        if len(images) == 0:
            return owner, images, segment

        # The rows of layout ``window`` are cut once for all epochs and seeds: a document must look the same in all.
        is_window = config.layout == "window"
        seed, epoch = (WINDOW_SEED, np.full(len(owner), WINDOW_SEED)) if is_window else (self.seed, epochs[owner])
        # An inline image is alone in its group; matched ones share one per sentence.
        group = np.where(matched, segment, slots.offsets[-1] + np.arange(len(images)))
        chosen = _smallest(group, 1, seed, Stream.SENTENCE_IMAGE, epoch, images)
        owner, images, segment, matched, epoch = (array[chosen] for array in (owner, images, segment, matched, epoch))
        chosen = _smallest(owner, config.max_images_per_document, seed, Stream.IMAGE_CHOICE, epoch, images)
        owner, images, segment, matched, epoch = (array[chosen] for array in (owner, images, segment, matched, epoch))
        after = matched & (keyed_hash(seed, Stream.PLACEMENT, epoch, images) >> np.uint64(63) == 1)
        slot = segment + after
        # Two images may meet at one slot: the one behind the sentence before it stands first.
        order = np.lexsort((images, ~after, slot))
        return owner[order], images[order], slot[order]


@dataclass(frozen=True)
class _Slots:
    """Places of images in some documents: before every text segment, and behind the last one. n documents.

    Slots are numbered over all of these documents. How much text stands before one is looked up, not summed: the text
    of thousands of segments is not touched for the sake of a few images.
    """

    corpus: Corpus
    offsets: np.ndarray
    """(n + 1,) int64, first slot of each document."""
    first_segments: np.ndarray
    """(n,) int64, first text segment of each document, numbered over the whole corpus."""
    text_begins: np.ndarray
    """(n,) int64, text tokens of the corpus before each document."""

    @classmethod
    def of(cls, corpus: Corpus, documents: np.ndarray) -> _Slots:
        """Read where the slots of documents are from the side arrays."""
        # A view without numpy's memmap class, whose every access costs a few microseconds.
        borders = np.asarray(corpus.document_segments)
        first = borders[documents]
        offsets = np.concatenate([[0], np.cumsum(borders[documents + 1] - first + 1)])
        return cls(corpus, offsets, first, corpus.text_tokens_before(first))

    def text_before(self, document: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """Return the text tokens of a document before a slot, for many at once."""
        segments = self.first_segments[document] + slot - self.offsets[document]
        return self.corpus.text_tokens_before(segments) - self.text_begins[document]


def concatenate_ranges(first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (i, value), each int64, of the concatenation of range(first[i], first[i] + counts[i]) for all i."""
    counts = np.asarray(counts, dtype=np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    begin = np.cumsum(counts) - counts
    return owner, np.arange(len(owner)) + (np.asarray(first, dtype=np.int64) - begin)[owner]


def _smallest(groups: np.ndarray, limit: int, *key: int | np.ndarray) -> np.ndarray:
    """Return, ascending, the indices of the ``limit`` elements of every group whose keys have the smallest hashes."""
    contested = np.flatnonzero(np.bincount(groups)[groups] > limit)
    hashes = keyed_hash(*(part[contested] if isinstance(part, np.ndarray) else part for part in key))
    order = contested[np.lexsort((hashes, groups[contested]))]
    is_first = np.diff(groups[order], prepend=-1) != 0
    rank = np.arange(len(order)) - np.flatnonzero(is_first)[np.cumsum(is_first) - 1]
    kept = np.ones(len(groups), dtype=bool)
    kept[order[rank >= limit]] = False
    return np.flatnonzero(kept)
