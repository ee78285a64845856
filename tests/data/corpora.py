"""Small corpora for tests of the online data path, written by the real writer, and the documents they were made of."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lcl_megatron.data.document import ImageKind, ImageSegment, Source
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument, StoredImage
from lcl_megatron.data.storage.corpus_writer import write_corpus
from lcl_megatron.data.tokenizer import Tokenizer, train_tokenizer

NUM_LATENTS = 4
FIRST_TEXT_ID = 7
"""Ids below it are special in every tokenizer of ``train_tokenizer``."""


@dataclass(frozen=True)
class WrittenCorpus:
    """A corpus and what is in it."""

    corpus: Corpus
    documents: list[EncodedDocument]

    def first_image(self, document: int) -> int:
        """Index in the corpus of a document's first image."""
        return sum(len(d.images) for d in self.documents[:document])


def tiny_tokenizer(folder: Path) -> Tokenizer:
    return train_tokenizer(["a small text about nothing at all", "and another one"], folder / "tokenizer.model", 290)


def jpeg(width: int, height: int, seed: int) -> bytes:
    """A JPEG of smooth random colours."""
    rng = np.random.default_rng(seed)
    grid = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    stream = io.BytesIO()
    grid.resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def stored_image(number: int, segment: int, similarity: float, kind: ImageKind, data: bytes) -> StoredImage:
    return StoredImage(ImageSegment(f"{number}.jpg", number, segment, similarity, kind), data, 40, 30)


def random_documents(count: int, seed: int, with_pixels: bool = False) -> list[EncodedDocument]:
    """Documents of every sort: without images or text, with empty and overlong segments, both kinds of images."""
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        segments = [
            rng.integers(FIRST_TEXT_ID, 280, int(rng.choice([0, 1, 3, 9, 40], p=[0.1, 0.2, 0.3, 0.3, 0.1]))).tolist()
            for _ in range(rng.integers(0, 9))
        ]
        kinds = rng.choice([ImageKind.MATCHED, ImageKind.INLINE], rng.integers(0, 9))
        places = sorted(
            (int(rng.integers(0, len(segments) + (kind == ImageKind.INLINE))), ImageKind(kind))
            for kind in kinds
            if segments or kind == ImageKind.INLINE
        )
        images = [
            stored_image(
                i,
                place,
                float(rng.choice([0.1, 0.3, 0.5])),
                kind,
                jpeg(int(rng.integers(20, 60)), int(rng.integers(20, 60)), seed * 1000 + number * 10 + i)
                if with_pixels
                else b"\xff",
            )
            for i, (place, kind) in enumerate(places)
        ]
        documents.append(EncodedDocument(segments, images, Source("docs.jsonl", number + 1)))
    return documents


def write(folder: Path, documents: list[EncodedDocument]) -> WrittenCorpus:
    return WrittenCorpus(write_corpus(folder / "corpus", documents, tiny_tokenizer(folder)), documents)
