"""Documents as a corpus stores them, made at random, and what a reader must find of them."""

from __future__ import annotations

import numpy as np

from lcl_megatron.data.document import ImageKind, ImageSegment, Source
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument, StoredImage


def make_documents(
    count: int, vocab_size: int, seed: int = 0, shard: str = "docs_shard_7.jsonl"
) -> list[EncodedDocument]:
    """Random documents with empty segments, several images per segment, names that are not ASCII, and no images."""
    rng = np.random.default_rng(seed)
    documents = []
    for number in range(count):
        segments = [rng.integers(7, vocab_size, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 6))]
        places = sorted(rng.integers(0, len(segments), rng.integers(0, 4)).tolist())
        images = []
        for index, place in enumerate(places):
            segment = ImageSegment(
                f"\u6f22{number}_{index}.jpg",
                5 - index,
                place,
                float(np.float32(rng.random())),
                ImageKind(int(rng.integers(2))),
            )
            width, height = (int(side) for side in rng.integers(1, 900, 2))
            images.append(StoredImage(segment, rng.bytes(int(rng.integers(1, 300))), width, height))
        documents.append(EncodedDocument(segments, images, Source(shard, 10 + number)))
    return documents


def read_documents(corpus: Corpus) -> list[tuple[object, ...]]:
    """Everything that a corpus says about its documents, by way of its public attributes."""
    found = []
    for document in range(corpus.num_documents):
        segments = range(*(int(border) for border in corpus.document_segments[document : document + 2]))
        images = range(*(int(border) for border in corpus.document_images[document : document + 2]))
        assert [int(corpus.segment_lengths[segment]) for segment in segments] == [
            len(corpus.segment_tokens(segment)) for segment in segments
        ]
        found.append(
            (
                corpus.document_source(document),
                [corpus.segment_tokens(segment).tolist() for segment in segments],
                [
                    (
                        corpus.image_bytes(image),
                        corpus.image_source(image),
                        int(corpus.image_segment[image]),
                        float(corpus.image_similarity[image]),
                        int(corpus.image_width[image]),
                        int(corpus.image_height[image]),
                        int(corpus.image_kind[image]),
                    )
                    for image in images
                ],
            )
        )
    return found


def expected(documents: list[EncodedDocument]) -> list[tuple[object, ...]]:
    return [
        (
            str(document.source),
            [list(segment) for segment in document.segments],
            [
                (
                    image.data,
                    f"{document.source} image {image.segment.number} ({image.segment.name})",
                    image.segment.segment_index,
                    image.segment.similarity,
                    image.width,
                    image.height,
                    int(image.segment.kind),
                )
                for image in document.images
            ],
        )
        for document in documents
    ]
