"""Statistics page of a corpus.

Oracles: counts in plain Python over the documents that the corpus was written from, numpy's quantiles of sorted
values, and ``html.parser``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.data.document import ImageKind, Source
from lcl_megatron.data.pages import corpus_statistics
from lcl_megatron.data.pages.corpus_report import write_report
from lcl_megatron.data.pages.corpus_statistics import SIMILARITY_EDGES, read_rejects, read_statistics
from lcl_megatron.data.pages.histogram import Histogram, bins_of
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument
from tests.data.corpora import jpeg, random_documents, stored_image, write
from tests.html_page import Node, assert_harmless, image_pixels, read_page
from tests.training.small_runs import DataFolder, picture

SCRIPT = "<script>alert('x')</script>"


def sources_of(documents: list[EncodedDocument]) -> list[EncodedDocument]:
    """The same documents from three sources, in order."""
    count = len(documents)
    return [
        EncodedDocument(d.segments, d.images, Source(f"part_{min(2, 4 * i // count)}.jsonl", i + 1))
        for i, d in enumerate(documents)
    ]


def report(corpus: Corpus, folder: Path) -> Node:
    """Write the page, check that it is harmless, and return it."""
    path = folder / "pages" / "corpus.statistics.html"
    write_report(corpus, path)
    page = read_page(path)
    assert_harmless(page)
    return page


def card(page: Node, name: str) -> str:
    """The value of a header figure."""
    (found,) = [
        node.all("b")[0].text for node in page.all("div", "cards")[0].all("div") if node.all("span")[0].text == name
    ]
    return found  # fmt: skip


@pytest.mark.parametrize("scale", [3, 100, 1e4, 1e9])
def test_histogram_counts_and_finds_quantiles(scale: float) -> None:
    values = np.random.default_rng(0).exponential(scale, 5000).astype(np.int64)
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.add(part)
    ordered = np.sort(values).tolist()
    assert (histogram.total, histogram.sum) == (5000, sum(ordered))
    assert (histogram.min, histogram.max) == (ordered[0], ordered[-1])
    for share in (0, 0.05, 0.5, 0.95, 1):
        exact = ordered[min(4999, int(share * 5000))]
        assert exact * (1 - 1 / 64) <= histogram.quantile(share) <= exact
    for limit in (1, 50, 128, 224, 2048):
        assert histogram.below(limit) == sum(value < limit for value in ordered)
    edges = np.array([0, 2, 4, 64, 128, 4096, 1 << 40])
    expected = [sum(a <= value < b for value in ordered) for a, b in itertools.pairwise(edges.tolist())]
    assert histogram.between(edges).tolist() == expected


def test_histogram_bins_are_in_order_up_to_the_largest_integer() -> None:
    values = np.array([0, 1, 127, 128, 129, 130, 255, 256, 260, 2**31 - 1, 2**40, 2**62])
    bins = bins_of(values)
    assert (np.diff(bins) >= 0).all()
    assert bins[:4].tolist() == [0, 1, 127, 128]
    assert bins[3] == bins[4]  # 128 and 129 share a bin
    empty = Histogram()
    empty.add(values[:0])
    assert (empty.total, empty.quantile(0.5), empty.mean) == (0, 0, 0)


def test_statistics_are_those_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = sources_of([d for d in random_documents(60, seed=1) if d.images])
    corpus = write(tmp_path, documents).corpus
    images = [image for d in documents for image in d.images]
    for chunk in (7, 1 << 17):
        monkeypatch.setattr(corpus_statistics, "CHUNK", chunk)
        found = read_statistics(corpus, 0.3)
        lengths = sorted(sum(len(s) for s in d.segments) for d in documents)
        for histogram, values in (
            (found.document_tokens, lengths),
            (found.segment_tokens, [len(s) for d in documents for s in d.segments]),
            (found.document_images, [len(d.images) for d in documents]),
            (found.images.bytes, [len(image.data) for image in images]),
            (found.images.short_side, [30] * len(images)),
        ):
            counts = Counter(values)
            assert {i: int(n) for i, n in enumerate(histogram.counts) if n} == dict(sorted(counts.items()))
        by_source = Counter(d.source.path for d in documents)
        assert found.source_documents.tolist() == [by_source[f"part_{i}.jsonl"] for i in range(3)]
        similar = [[image.segment.similarity >= 0.3 for image in d.images] for d in documents]
        assert found.images.similar == sum(map(sum, similar))
        assert found.similar_documents == sum(map(any, similar))
        by_similarity = Counter(min(99, int(image.segment.similarity * 100 + 1e-4)) for image in images)
        assert {i: int(n) for i, n in enumerate(found.images.similarity) if n} == dict(sorted(by_similarity.items()))
        assert found.images.sizes.sum() == found.images.aspect.sum() == len(images)
        distinct = {hashlib.sha256(image.data).digest() for image in images}
        assert (found.duplicates.compared, found.duplicates.distinct) == (len(images), len(distinct))
        assert found.rejects == ()


def test_odd_images_are_counted_where_they_belong(tmp_path: Path) -> None:
    corpus = write(tmp_path, [document_of(10)]).corpus
    corpus.image_width = np.array([0, 500, 40, 30, 1, 60_000, 90, 300, 300, 300], dtype=np.int32)
    corpus.image_height = np.array([9, 100, 130, 90, 1, 60_000, 30, 300, 300, 300], dtype=np.int32)
    corpus.image_similarity = np.array([np.nan, -0.5, 1, 1, 1.5, 0.24, 0.2399, 0.25, 0, 0.995], dtype=np.float32)
    images = read_statistics(corpus, 0.24).images
    assert images.unknown_size == 1
    assert images.extreme_aspect == 2  # 500 x 100 and 40 x 130; 30 x 90 and 90 x 30 are just not
    assert images.sizes.sum() == 9
    assert (images.sizes[0, 0], images.sizes[-1, -1]) == (1, 1)
    assert images.similarity.sum() == 9
    assert (images.similarity[0], images.similarity[99], images.similarity_of_one) == (2, 4, 2)
    assert images.similar == sum(float(s) >= np.float32(0.24) for s in corpus.image_similarity)
    assert len(SIMILARITY_EDGES) == len(images.similarity) + 1


def document_of(count: int) -> EncodedDocument:
    """A document of one sentence and some images."""
    images = [stored_image(i, 0, 0.5, ImageKind.MATCHED, b"\xff") for i in range(count)]
    return EncodedDocument([[9, 10, 11]], images, Source("docs.jsonl", 1))


def test_equal_images_are_found_exactly_or_in_a_fair_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write(tmp_path, [document_of(400)]).corpus
    rng = np.random.default_rng(3)
    hashes = rng.choice(rng.integers(0, 1 << 64, 150, dtype=np.uint64), 400)
    hashes[::4] = hashes[0]
    corpus.image_hash = hashes
    counts = Counter(hashes.tolist())
    found = read_statistics(corpus, 0.24).duplicates
    assert (found.compared, found.distinct, found.is_sample) == (400, len(counts), False)
    assert found.most_frequent[0] == (0, counts[int(hashes[0])])
    first = {image: counts[int(hashes[image])] for image, _ in found.most_frequent}
    assert dict(found.most_frequent) == first
    assert sorted(counts.values())[-8:] == sorted(first.values())

    monkeypatch.setattr(corpus_statistics, "MAX_HASHES", 100)
    sample = read_statistics(corpus, 0.24).duplicates
    inside = {key: count for key, count in counts.items() if key < (1 << 64) // 4}
    assert (sample.compared, sample.distinct, sample.is_sample) == (sum(inside.values()), len(inside), True)
    assert sample.copies.max == max(inside.values())
    assert "a sample of" in report(corpus, tmp_path).text


def test_rejects_are_counted_and_sampled(tmp_path: Path) -> None:
    path = tmp_path / "rejects.jsonl"
    records = [{"file": "a", "line": i, "reason": f"reason {i % 3}", "detail": ""} for i in range(30)]
    records += [
        {"file": "a", "line": i, "reason": "reason 0", "detail": "", "image": 1, "image_name": "n"} for i in range(2)
    ]
    records += [{"file": "b", "line": i, "reason": f"odd {i}", "detail": ""} for i in range(200)]  # fmt: skip
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = read_rejects(path)
    assert sum(reason.count for reason in found) == len(records)
    by_reason = {(reason.what, reason.reason): reason for reason in found}
    assert by_reason["document", "reason 0"].count == 10
    assert by_reason["image", "reason 0"].count == 2
    assert by_reason["document", corpus_statistics.OTHER_REASONS].count == 200 - (100 - 4)
    for reason in found:
        assert len(reason.examples) == min(3, reason.count)
        assert all(example in records for example in reason.examples)
    assert [reason.count for reason in found] == sorted((reason.count for reason in found), reverse=True)
    assert read_rejects(path) == found


def test_page_shows_hostile_data_as_text(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    texts = [SCRIPT, "caf\u00e9 \u4e2d\u6587 \U0001f600", "x\x1b[31m </p>"]
    data.write([(texts, [(f"{i}<b>.png", 0), ("gone<i>.png", 1), ("../up.png", 2)]) for i in range(4)])
    (data.images / "gone<i>.png").unlink()
    (data.images / "1<b>.png").write_bytes(picture(1)[:60])
    with data.shard.open("a") as stream:
        stream.write(f"not json {SCRIPT}\n")
    (data.images.parent / "up.png").unlink(missing_ok=True)
    corpus = data.preprocess(max_rejected_image_share=1.0).corpus
    page = report(corpus, tmp_path)

    assert card(page, "Documents") == "4"
    assert card(page, "Images") == "4"
    assert card(page, "Rejected documents") == "1"
    assert card(page, "Rejected images") == "8"
    rows = [[cell.text for cell in row.all("td")] for row in page.all("table", "words")[0].all("tr")[1:]]
    assert sorted(row[:3] for row in rows) == [
        ["1", "document", "malformed JSON"],
        ["4", "image", "missing file"],
        ["4", "image", "unsafe image name"],
    ]
    assert any("(gone<i>.png)" in row[3] for row in rows)
    articles = page.all("article")
    assert len(articles) == 4
    for article in articles:
        shown = [node.text.rstrip() for node in article.all("span", "segment")]
        assert shown == [SCRIPT, "caf\u00e9 \u4e2d\u6587 \U0001f600", "x\u241b[31m </p>"]
    broken = [node for article in articles for node in article.all("div", "broken")]
    assert len(broken) == 1
    pictures = [image_pixels(image) for article in articles for image in article.all("img")]
    assert [pixels.shape for pixels in pictures] == [(20, 20, 3)] * 3


def test_page_of_a_tiny_corpus(tmp_path: Path) -> None:
    empty = EncodedDocument([], [], Source("docs.jsonl", 1))
    page = report(write(tmp_path, [empty]).corpus, tmp_path)
    assert card(page, "Documents") == "1"
    assert card(page, "Images") == "0"
    assert len(page.all("div", "drawings")) == 2
    assert "every image was kept" in page.text


def test_page_shortens_what_is_long(tmp_path: Path) -> None:
    documents = [
        EncodedDocument(
            [[9] * 3000, *([[9, 10]] * 60)],
            [stored_image(i, 0, 0.5, ImageKind.MATCHED, jpeg(40, 30, i)) for i in range(20)],
            Source("docs.jsonl", 1),
        )
    ]
    page = report(write(tmp_path, documents).corpus, tmp_path)
    (article,) = page.all("article")
    assert len(article.all("span", "segment")) == 40
    assert len(article.all("img")) == 12
    assert "21 more text segments, 8 more images" in article.text
    assert len(article.all("span", "segment")[0].text) < 700
    assert "61 segments" in article.all("h3")[0].text


def test_equal_corpora_give_equal_pages(tmp_path: Path) -> None:
    corpus = write(tmp_path, sources_of(random_documents(12, seed=2, with_pixels=True))).corpus
    pages = []
    for name in ("a.html", "b.html"):
        write_report(corpus, tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
