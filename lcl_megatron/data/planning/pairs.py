"""View ``pairs``: every image with the sentence that it is matched to is a document of its own.

Over an MMC4 corpus this is MMC4-Pair, over captioned images it is what they are (LCL paper, section 4.1). A pair is
``BOS, text, BoI, L x image, EoI, EOS``, or with the image first, with probability 1/2 each, anew in every epoch;
``data.pair_placement`` fixes one of the two for all.
Nothing is copied: the view is computed from the corpus of documents.
"""

from __future__ import annotations

import numpy as np

from lcl_megatron.data.document import ImageKind
from lcl_megatron.data.order import Stream, keyed_hash
from lcl_megatron.data.planning.compose import NO_SIMILAR_IMAGE, ComposedDocuments, Composer, DocumentSizes

NOT_MATCHED = "image that is matched to no sentence"
NO_TEXT = "image whose sentence is empty"
PAIR_TOO_LONG = "pair longer than seq_length"


class PairComposer(Composer):
    """Composes pairs. A "document" is an image here, by its index in the corpus."""

    @property
    def most_images(self) -> int:
        """Images that a pair shows: one."""
        return 1

    @property
    def num_documents(self) -> int:
        """How many pairs there are to compose, those that are left out included: one per image."""
        return self.corpus.num_images

    def document_source(self, document: int) -> str:
        """Return where a pair comes from: ``docs_shard_7.jsonl:1312 image 3 (a1b2.jpg)``."""
        return self.corpus.image_source(document)

    def sizes(self, begin: int, end: int) -> DocumentSizes:
        """Return what the pairs [begin, end) need of a row, in any epoch."""
        corpus = self.corpus
        text = np.zeros(end - begin, dtype=np.int64)
        matched = np.asarray(corpus.image_kind[begin:end]) == int(ImageKind.MATCHED)
        first, last = (int(document) for document in corpus.image_documents(np.array([begin, end - 1])))
        borders = np.clip(corpus.document_images[first : last + 2], begin, end)
        documents = np.repeat(np.arange(first, last + 1), np.diff(borders))
        segments = self._segments(np.arange(begin, end)[matched], documents[matched])
        text[matched] = np.asarray(corpus.segment_lengths)[segments]
        lengths = 2 + text + self.span
        reasons = {
            NOT_MATCHED: ~matched,
            NO_SIMILAR_IMAGE: np.asarray(corpus.image_similarity[begin:end]) < self.config.min_similarity,
            NO_TEXT: text == 0,
            PAIR_TOO_LONG: lengths > self.config.seq_length,
        }
        return DocumentSizes.of(lengths, np.ones(end - begin, dtype=np.int64), reasons)

    def compose(self, documents: np.ndarray, epochs: np.ndarray | int) -> ComposedDocuments:
        """Return lengths, images and targets of pairs; no token is read.

        Args:
            documents: (n,) indices of images in the corpus, none of them left out by ``sizes``.
            epochs: Epoch of each, (n,), or of all.
        """
        images = np.asarray(documents, dtype=np.int64)
        epochs = np.broadcast_to(np.asarray(epochs, dtype=np.int64), images.shape)
        segments = self._segments(images, self.corpus.image_documents(images))
        text = np.asarray(self.corpus.segment_lengths)[segments].astype(np.int64)
        after = np.full(len(images), self.config.pair_placement == "text_first")
        if self.config.pair_placement == "random":
            after = keyed_hash(self.seed, Stream.PLACEMENT, epochs, images) >> np.uint64(63) == 1
        positions = 1 + np.where(after, text, 0)
        return ComposedDocuments(
            documents=images,
            epochs=epochs,
            lengths=2 + text + self.span,
            first_segments=segments,
            num_segments=np.ones(len(images), dtype=np.int64),
            num_targets=text + 2,
            image_offsets=np.arange(len(images) + 1),
            images=images,
            image_positions=positions,
            has_context=after if self.config.context_rule == "content" else np.ones(len(images), dtype=bool),
        )

    def _segments(self, images: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Return the text segment, numbered over the whole corpus, of each image, whose document is known."""
        segments = np.asarray(self.corpus.image_segment)[images]
        return np.asarray(self.corpus.document_segments)[documents] + segments
