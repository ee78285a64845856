"""A page that shows what a corpus holds: figures, drawings, what was left out, and some documents.

Everything that is counted is counted over the whole corpus, except where the page says that it is a sample.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lcl_megatron.config.run import DataConfig
from lcl_megatron.data.decoding.image_probe import ImageError
from lcl_megatron.data.decoding.images import decode_rgb
from lcl_megatron.data.document import ImageKind
from lcl_megatron.data.pages.corpus_drawings import document_drawings, image_drawings, share
from lcl_megatron.data.pages.corpus_statistics import CorpusStatistics, Duplicates, RejectReason, read_statistics
from lcl_megatron.data.pages.page import Html, cards, counted, element, jpeg_image, table, write_page
from lcl_megatron.data.storage.corpus import Corpus

NUM_EXAMPLES = 6
"""Documents that are shown."""
MAX_SEGMENTS = 40
"""Text segments that are shown of a document."""
MAX_IMAGES = 12
"""Images that are shown of a document."""
MAX_TEXT = 600
"""Characters that are shown of a text segment, a name or the detail of a reject."""
MAX_SOURCES = 20
"""Sources that are listed: all, or the smallest and the largest ones."""
THUMBNAIL = 160
"""Longest side of a thumbnail, pixels."""


def write_report(corpus: Corpus, path: Path) -> None:
    """Write the statistics page of a corpus: one HTML file without anything outside it.

    Reads the side arrays and ``rejects.jsonl`` once, and the tokens and images of a few documents.

    Args:
        corpus: The corpus.
        path: File to write.
    """
    statistics = read_statistics(corpus, DataConfig.min_similarity)
    page = write_page(
        "Corpus statistics",
        _STYLE,
        element("p", element("code", corpus.path)),
        element("p", "Token counts are of text, without special tokens and images. What is not said to be a sample is "
                "counted over the whole corpus; quantiles are exact below 128 and else at most 1/64 too low."),
        cards(_header(corpus, statistics)),
        element("h2", "Documents"),
        element("div", *document_drawings(statistics), class_="drawings"),
        _source_table(corpus, statistics.source_documents),
        element("h2", "Images"),
        element("div", *image_drawings(statistics), class_="drawings"),
        element("h2", "Equal images"),
        *_duplicates(corpus, statistics.duplicates),
        element("h2", "Left out"),
        *_rejects(statistics.rejects),
        element("h2", "Some documents"),
        element("p", "Random ones, as the corpus holds them: before a run chooses among the images and places them. "
                "A line divides text segments."),
        *(_document(corpus, document) for document in _example_documents(corpus)),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _header(corpus: Corpus, statistics: CorpusStatistics) -> Iterator[tuple[str, object, str]]:
    counts = corpus.manifest["counts"]
    documents, images = max(1, corpus.num_documents), max(1, corpus.num_images)
    yield "Documents", f"{corpus.num_documents:,}", f"of {counted(len(statistics.source_documents), 'source')}"
    yield "Images", f"{corpus.num_images:,}", f"{corpus.num_images / documents:.2f} per document"
    yield "Text tokens", f"{counts['tokens']:,}", f"{counts['tokens'] / documents:,.0f} per document"
    yield "Image bytes", _size(counts["image_bytes"]), f"{_size(counts['image_bytes'] / images)} per image"
    files = corpus.manifest["files"].values()
    yield "On disk", _size(sum(entry["bytes"] for entry in files)), "all files"
    for what, kept in (("document", corpus.num_documents), ("image", corpus.num_images)):
        left_out = sum(reason.count for reason in statistics.rejects if reason.what == what)
        yield f"Rejected {what}s", f"{left_out:,}", f"{share(left_out, left_out + kept)} of all"
    yield "Tokenizer", f"{corpus.vocab_size:,} ids", f"SHA-256 {corpus.tokenizer.fingerprint[:16]}"
    yield "Fingerprint", corpus.fingerprint[:12], "of the content"


def _source_table(corpus: Corpus, documents: np.ndarray) -> Html:
    names = [source["name"] for source in corpus.manifest["sources"]]
    order: Sequence[int] = range(len(names))
    title = f"List of {counted(len(names), 'source')}"
    if len(names) > MAX_SOURCES:
        by_size = np.argsort(documents, kind="stable")
        order = [*by_size[: MAX_SOURCES // 2].tolist(), *by_size[-(MAX_SOURCES // 2) :].tolist()]
        title = f"The smallest and the largest of {len(names):,} sources"
    rows = ((names[i], i, f"{documents[i]:,}") for i in order)
    return element("details", element("summary", title), table(("source", "number", "documents"), rows))


def _duplicates(corpus: Corpus, duplicates: Duplicates) -> Iterator[Html]:
    repeated = duplicates.compared - duplicates.distinct
    of_all = f"a sample of {duplicates.compared:,} images" if duplicates.is_sample else f"all {duplicates.compared:,}"
    copies = duplicates.copies
    yield element(
        "p",
        f"{share(repeated, duplicates.compared)} of the images repeat another one byte for byte ({repeated:,} of "
        f"{of_all}). {copies.total - copies.below(2):,} different images occur more than once; the most frequent one "
        f"{copies.max:,} times.",
        " The sample is a part of the range of hashes, so all copies of an image are in it, or none."
        if duplicates.is_sample
        else "",
    )
    figures = (
        element("figure", _thumbnail(corpus, image), element("figcaption", f"{count:,} times"))
        for image, count in duplicates.most_frequent
    )
    yield element("div", *figures, class_="thumbnails")


def _rejects(rejects: Sequence[RejectReason]) -> Iterator[Html]:
    if not rejects:
        yield element("p", "Nothing: every line became a document, and every image was kept.")
        return
    yield element("p", "Every line of the sources became a document or a reject, and every image of a kept line was "
                  "stored or rejected. Examples are random ones.")  # fmt: skip
    rows = (
        (f"{reason.count:,}", reason.what, _cut(reason.reason), element("ul", *map(_reject, reason.examples)))
        for reason in rejects
    )
    yield table(("count", "what", "reason", "examples"), rows, class_="words")


def _reject(record: dict[str, object]) -> Html:
    place = f"{record['file']}:{record['line']}"
    if "image" in record:
        place += f" image {record['image']} ({record['image_name']})"
    return element("li", element("code", _cut(place)), " ", _cut(str(record["detail"])))


def _example_documents(corpus: Corpus) -> list[int]:
    """Return random documents, the same for equal corpora."""
    rng = random.Random(corpus.fingerprint)
    return sorted(rng.sample(range(corpus.num_documents), min(NUM_EXAMPLES, corpus.num_documents)))


def _document(corpus: Corpus, document: int) -> Html:
    """Return a document: its segments in order, beside each the images that belong to it."""
    first, end = (int(border) for border in corpus.document_segments[document : document + 2])
    images = range(*(int(border) for border in corpus.document_images[document : document + 2]))
    tokens = int(corpus.segment_lengths[first:end].sum(dtype=np.int64))
    blocks: list[Html] = []
    for index in range(min(end - first, MAX_SEGMENTS) + 1):
        here = [image for image in images[:MAX_IMAGES] if corpus.image_segment[image] == index]
        blocks.extend(_image(corpus, image) for image in here)
        if index < min(end - first, MAX_SEGMENTS):
            text = corpus.tokenizer.decode(corpus.segment_tokens(first + index))
            blocks.append(element("span", _cut(text), " ", class_="segment", title=f"segment {index}"))
    left = (("text segments", end - first - MAX_SEGMENTS), ("images", len(images) - MAX_IMAGES))
    more = ", ".join(f"{number:,} more {what}" for what, number in left if number > 0)
    heading = (
        f"{corpus.document_source(document)} \u00b7 document {document:,} \u00b7 {counted(tokens, 'token')} in "
        f"{counted(end - first, 'segment')} \u00b7 {counted(len(images), 'image')}"
    )
    return element("article", element("h3", heading), element("div", *blocks), element("small", more))


def _image(corpus: Corpus, image: int) -> Html:
    kind = "matched to" if corpus.image_kind[image] == ImageKind.MATCHED else "stands before"
    return element(
        "figure",
        _thumbnail(corpus, image),
        element(
            "figcaption",
            f"{corpus.image_width[image]} x {corpus.image_height[image]}, similarity "
            f"{corpus.image_similarity[image]:.3f}, {kind} segment {corpus.image_segment[image]}",
        ),
        title=_cut(corpus.image_source(image)),
    )


def _thumbnail(corpus: Corpus, image: int) -> Html:
    """Return a small picture of an image, or why there is none."""
    try:
        pixels = decode_rgb(corpus.image_bytes(image), DataConfig.max_image_pixels)
    except ImageError as error:
        return element("div", _cut(str(error)), class_="broken")
    small = Image.fromarray(pixels)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return jpeg_image(np.asarray(small), _cut(corpus.image_source(image)))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} \u2026 ({len(text):,} characters)"


def _size(count: float) -> str:
    """Return a number of bytes with a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


_STYLE = """
details { margin: 1rem 0 } summary { cursor: pointer; color: #555 }
table.words ul { margin: 0; padding-left: 1rem } table.words td { max-width: 60rem }
article { border: 1px solid #e2e2e2; border-radius: 8px; padding: .2rem 1.1rem 1rem; margin: 1rem 0; overflow: auto;
          max-height: 24rem }
article h3 { font-size: .85rem; font-weight: 600; color: #666 } article > small { color: #777 }
article figure { float: right; clear: right; max-width: 170px; margin: 0 0 .8rem 1.4rem }
article img, .thumbnails img { max-width: 160px; max-height: 160px; border-radius: 4px; border: 1px solid #e2e2e2 }
.segment:hover { background: #fff3d6 } .segment { white-space: pre-wrap }
.segment::after { content: "| "; color: #c4c4c4 }
.thumbnails { display: flex; flex-wrap: wrap; gap: 1rem }
.broken { width: 150px; border: 2px solid #c33; border-radius: 4px; padding: .4rem; color: #a11; font-size: .8rem }
"""
