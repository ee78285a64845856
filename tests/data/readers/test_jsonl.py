"""The plain interleaved format. Oracle: documents made by hypothesis, written down and read back; rejects by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.data.document import Document, ImageKind, Reject
from lcl_megatron.data.readers.jsonl import read_jsonl

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = st.from_regex(r"[a-z0-9]{1,8}(/[a-z0-9]{1,8})?\.jpg", fullmatch=True)
ITEM = st.one_of(
    st.fixed_dictionaries({"text": TEXT}),
    st.fixed_dictionaries({"image": NAME}, optional={"similarity": st.floats(-1, 1)}),
    st.fixed_dictionaries({"image": NAME, "matched_text_index": st.integers(0, 2)}),
)
DOCUMENT = st.lists(ITEM, max_size=8).map(lambda items: [*items, {"text": "1"}, {"text": "2"}, {"text": "3"}])


def write(path: Path, records: list[object]) -> Path:
    raw = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def expected_images(items: list[dict[str, object]]) -> list[tuple[object, ...]]:
    """Brute force: the place of every image, by counting the texts before it."""
    found = []
    for position, item in enumerate(items):
        if "image" in item:
            before = sum("text" in other for other in items[:position])
            matched = "matched_text_index" in item
            place = item.get("matched_text_index", before)
            kind = ImageKind.MATCHED if matched else ImageKind.INLINE
            number = sum("image" in other for other in items[:position])
            found.append((place, number, item["image"], item.get("similarity", 1.0), kind))
    return sorted(found, key=lambda image: image[:2])


@given(st.lists(DOCUMENT, max_size=4), st.sampled_from(["s.jsonl", "s.jsonl.gz"]))
@settings(max_examples=80, deadline=None)
def test_documents_read_back(tmp_path_factory, documents: list[list[dict[str, object]]], name: str):
    path = write(tmp_path_factory.mktemp("jsonl") / name, [{"items": items, "url": "u"} for items in documents])
    found = list(read_jsonl(path))
    assert len(found) == len(documents)
    for line, (item, items) in enumerate(zip(found, documents, strict=True), start=1):
        images = expected_images(items)
        assert str(item.source) == f"s.jsonl:{line}"
        if not images:
            assert isinstance(item, Reject)
            assert item.reason == "no images"
            continue
        assert isinstance(item, Document)
        assert [s.text for s in item.segments] == [str(i["text"]).strip() for i in items if "text" in i]
        assert [(i.segment_index, i.number, i.name, i.similarity, i.kind) for i in item.images] == images


def test_the_examples_of_the_documentation(tmp_path):
    lines = [
        {"items": [{"text": "We left at dawn."}, {"image": "a/1.jpg"}, {"text": "The bridge was closed."}]},
        {"items": [{"text": "A."}, {"text": "B."}, {"image": "2.jpg", "matched_text_index": 0, "similarity": 0.31}]},
    ]
    first, second = read_jsonl(write(tmp_path / "s.jsonl", lines))
    assert isinstance(first, Document)
    assert isinstance(second, Document)
    assert [(i.segment_index, i.kind) for i in first.images] == [(1, ImageKind.INLINE)]
    assert [(i.segment_index, i.kind, i.similarity) for i in second.images] == [(0, ImageKind.MATCHED, 0.31)]


IMAGE = {"image": "a.jpg"}
BAD = {
    "cut": (b'{"items": [', "malformed JSON"),
    "latin-1": (b'{"items": [{"text": "\xe9"}]}', "not UTF-8"),
    "a list": ([IMAGE], "wrong type"),
    "no items": ({"texts": []}, "missing field"),
    "items null": ({"items": None}, "wrong type"),
    "item a string": ({"items": ["a", IMAGE]}, "wrong type"),
    "both": ({"items": [{"text": "a", "image": "a.jpg"}]}, "inconsistent record"),
    "neither": ({"items": [{}, IMAGE]}, "inconsistent record"),
    "unknown field of an image": ({"items": [IMAGE | {"matched_text_idx": 0}]}, "unknown field"),
    "unknown field of a text": ({"items": [{"text": "a", "similarity": 1}, IMAGE]}, "unknown field"),
    "text null": ({"items": [{"text": None}, IMAGE]}, "wrong type"),
    "text surrogate": ({"items": [{"text": "\ud800"}, IMAGE]}, "not UTF-8"),
    "name a number": ({"items": [{"image": 3}]}, "wrong type"),
    "index a boolean": ({"items": [{"text": "a"}, IMAGE | {"matched_text_index": True}]}, "wrong type"),
    "index too large": ({"items": [{"text": "a"}, IMAGE | {"matched_text_index": 1}]}, "index out of range"),
    "index negative": ({"items": [{"text": "a"}, IMAGE | {"matched_text_index": -1}]}, "index out of range"),
    "similarity null": ({"items": [IMAGE | {"similarity": None}]}, "wrong type"),
    "similarity infinite": (b'{"items": [{"image": "a.jpg", "similarity": 1e999}]}', "wrong type"),
    "no images": ({"items": [{"text": "a"}]}, "no images"),
    "empty": ({"items": []}, "no images"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_costs_only_itself(tmp_path, name: str):
    record, reason = BAD[name]
    good = {"items": [{"text": "a"}, IMAGE]}
    first, bad, last = read_jsonl(write(tmp_path / "s.jsonl", [good, record, good]))
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(bad, Reject)
    assert (bad.reason, str(bad.source), bad.image_number) == (reason, "s.jsonl:2", None)


def test_an_unsafe_name_costs_the_image_only(tmp_path):
    items = [{"image": "../a.jpg"}, {"text": "a"}, IMAGE]
    reject, document = read_jsonl(write(tmp_path / "s.jsonl", [{"items": items}]))
    assert isinstance(reject, Reject)
    assert isinstance(document, Document)
    assert (reject.reason, reject.image_number) == ("unsafe image name", 0)
    assert [image.number for image in document.images] == [1]


def test_a_damaged_gzip_stops_with_its_name(tmp_path):
    path = write(tmp_path / "s.jsonl.gz", [{"items": [{"text": str(n)}, IMAGE]} for n in range(500)])
    data = path.read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0xFF
    for damaged in (data[: len(data) // 2], bytes(changed), b"<html>404</html>"):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"s.jsonl.gz is a damaged gzip file .*; fetch it again or leave it out"):
            list(read_jsonl(path))
