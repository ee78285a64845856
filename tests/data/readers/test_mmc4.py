"""The MMC4 reader. Oracle: records written by the test, read back field by field, and rejects listed by hand."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.data.document import Document, ImageKind, Reject
from lcl_megatron.data.readers import lines as reader
from lcl_megatron.data.readers.lines import read_lines
from lcl_megatron.data.readers.mmc4 import read_mmc4


def good(index: int) -> dict[str, object]:
    image = {"image_name": f"{index}.jpg", "matched_text_index": 1, "matched_sim": 0.25 + index / 100}
    return {"text_list": [f"Document {index}.", "Its image."], "image_info": [image]}


def changed(change: object, *, image: bool = False) -> bytes:
    """A good record with fields replaced; a field set to ``...`` is removed."""
    record = good(9)
    target = record["image_info"][0] if image else record
    for key, value in change.items():
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return json.dumps(record).encode()


BROKEN = {
    "cut off": (json.dumps(good(9)).encode()[:40], "malformed JSON"),
    "trailing junk": (json.dumps(good(9)).encode() + b"}", "malformed JSON"),
    "NaN": (changed({"matched_sim": float("nan")}, image=True), "malformed JSON"),
    "too deep": (b"[" * 100_000, "malformed JSON"),
    "huge integer": (b'{"text_list": [' + b"9" * 5000 + b"]}", "malformed JSON"),
    "NUL": (b"\x00\x00", "malformed JSON"),
    "latin-1": ('{"text_list": ["caf\u00e9"], "image_info": []}'.encode("latin-1"), "not UTF-8"),
    "surrogate in text": (changed({"text_list": ["\ud800", "x"]}), "not UTF-8"),
    "surrogate in name": (changed({"image_name": "\udc80.jpg"}, image=True), "not UTF-8"),
    "list at top": (b"[1, 2]", "wrong type"),
    "no texts": (changed({"text_list": ...}), "missing field"),
    "no image_info": (changed({"image_info": ...}), "missing field"),
    "texts null": (changed({"text_list": None}), "wrong type"),
    "text null": (changed({"text_list": ["a", None]}), "wrong type"),
    "image is a string": (changed({"image_info": ["a.jpg"]}), "wrong type"),
    "no name": (changed({"image_name": ...}, image=True), "missing field"),
    "no index": (changed({"matched_text_index": ...}, image=True), "missing field"),
    "no similarity": (changed({"matched_sim": ...}, image=True), "missing field"),
    "similarity null": (changed({"matched_sim": None}, image=True), "wrong type"),
    "similarity string": (changed({"matched_sim": "0.3"}, image=True), "wrong type"),
    "similarity infinite": (
        json.dumps(good(9)).encode().replace(b"0.33999999999999997", b"1e999").replace(b"0.34", b"1e999"),
        "wrong type",
    ),
    "similarity too large": (changed({"matched_sim": 10**400}, image=True), "wrong type"),
    "index boolean": (changed({"matched_text_index": True}, image=True), "wrong type"),
    "index float": (changed({"matched_text_index": 1.0}, image=True), "wrong type"),
    "index too large": (changed({"matched_text_index": 2}, image=True), "index out of range"),
    "index negative": (changed({"matched_text_index": -1}, image=True), "index out of range"),
    "no texts at all": (changed({"text_list": []}), "index out of range"),
    "no images": (changed({"image_info": []}), "no images"),
}


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_line_costs_only_itself(mmc4, name: str, place: int):
    line, reason = BROKEN[name]
    lines = [good(index) for index in range(3)]
    clean = list(read_mmc4(mmc4.add_shard("clean.jsonl", lines), "s.jsonl"))
    items = list(read_mmc4(mmc4.add_shard("shard.jsonl", [*lines[:place], line, *lines[place:]]), "s.jsonl"))
    rejects = [item for item in items if isinstance(item, Reject)]
    documents = [item for item in items if isinstance(item, Document)]
    assert [(reject.reason, str(reject.source), reject.image_number) for reject in rejects] == [
        (reason, f"s.jsonl:{place + 1}", None)
    ]
    assert [(item.segments, item.images) for item in documents] == [(item.segments, item.images) for item in clean]
    assert len(documents) == 3


@pytest.mark.parametrize(
    "name",
    [
        "docs_shard_7_v2.jsonl",
        "docs_shard_7_v2.jsonl.zip",
        "docs_shard_7_v2.jsonl.gz",
        "docs_no_face_shard_7_v2.jsonl.zip",
        "docs_no_face_shard_7_v3.jsonl",
        "docs_no_face_shard_7_v3.jsonl.zip",
    ],
)
def test_documents_read_back(mmc4, record, name: str):
    texts = ["First.", "  Second, padded. \n", "", "caf\u00e9 \u6f22\u5b57"]
    images = [("b.jpg", 3, 0.25), ("sub/a.jpg", 0, 0.5), ("c.jpg", 3, 1)]
    (document,) = read_mmc4(mmc4.add_shard(name, [b"", b"   ", record(texts, images)]))
    assert isinstance(document, Document)
    assert [segment.text for segment in document.segments] == ["First.", "Second, padded.", "", texts[3]]
    assert str(document.source) == f"{name.removesuffix('.zip').removesuffix('.gz')}:3"
    # Sorted by sentence, in the record's order within a sentence; the number is the place in the record.
    assert [(image.name, image.number, image.segment_index, image.similarity) for image in document.images] == [
        ("sub/a.jpg", 1, 0, 0.5),
        ("b.jpg", 0, 3, 0.25),
        ("c.jpg", 2, 3, 1.0),
    ]
    assert all(image.kind is ImageKind.MATCHED for image in document.images)


@pytest.mark.parametrize(
    "name", ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "a\\..\\x.jpg", "x\x00.jpg", "", ".", ".."]
)
def test_a_name_that_could_leave_the_folder_costs_the_image_only(mmc4, record, name: str):
    shard = mmc4.add_shard("s.jsonl", [record(["One.", "Two."], [(name, 0, 0.3), ("fine.jpg", 1, 0.3)])])
    reject, document = read_mmc4(shard)
    assert isinstance(reject, Reject)
    assert isinstance(document, Document)
    assert (reject.reason, reject.image_number, reject.image_name) == ("unsafe image name", 0, name)
    assert [image.name for image in document.images] == ["fine.jpg"]
    shard = mmc4.add_shard("t.jsonl", [record(["One."], [(name, 0, 0.3)])])
    assert [item.reason for item in read_mmc4(shard)] == ["unsafe image name", "no images"]


def test_a_byte_order_mark_is_tolerated_at_the_start_only(mmc4):
    mark = b"\xef\xbb\xbf"
    shard = mmc4.add_shard("s.jsonl", [mark + json.dumps(good(1)).encode(), mark + json.dumps(good(2)).encode()])
    first, second = read_mmc4(shard)
    assert isinstance(first, Document)
    assert isinstance(second, Reject)


def test_a_line_too_long_is_rejected_without_being_held(mmc4, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 1000)
    shard = mmc4.add_shard("s.jsonl", [good(0), b"x" * 12_345, good(1), b"y" * 999, b"z" * 1001])
    shard.write_bytes(shard.read_bytes()[:-1])
    items = list(read_mmc4(shard))
    assert [(item.source.line, getattr(item, "reason", "")) for item in items] == [
        (1, ""),
        (2, "line too long"),
        (3, ""),
        (4, "malformed JSON"),
        (5, "line too long"),
    ]


def test_a_zip_of_several_files_names_the_member(mmc4):
    path = mmc4.path / "both.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", json.dumps(good(1)))
        archive.writestr("sub/", "")
        archive.writestr("../b.jsonl", json.dumps(good(2)))
    assert [str(item.source) for item in read_mmc4(path)] == ["both.zip/a.jsonl:1", "both.zip/../b.jsonl:1"]
    assert not (mmc4.path.parent / "b.jsonl").exists()


def test_every_member_of_a_zip_may_begin_with_a_byte_order_mark(mmc4):
    path = mmc4.path / "both.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(2):
            archive.writestr(f"{index}.jsonl", b"\xef\xbb\xbf" + json.dumps(good(index)).encode())
    assert all(isinstance(item, Document) for item in read_mmc4(path))


@pytest.mark.parametrize("damage", ["no zip", "cut", "flipped"])
def test_a_damaged_zip_stops_with_its_name(mmc4, damage: str):
    path = mmc4.add_shard("s.jsonl.zip", [good(index) for index in range(200)])
    data = bytearray(path.read_bytes())
    if damage == "no zip":
        data = bytearray(b"<html>404</html>")
    elif damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"s.jsonl.zip is a damaged zip file"):
        list(read_mmc4(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["text_list", "image_info", "image_name", "matched_text_index", "matched_sim"]), inner
        )
    ),
    max_leaves=12,
)


@given(st.lists(JSON | st.binary(max_size=30), max_size=6))
@settings(max_examples=200, deadline=None)
def test_every_line_is_a_document_or_a_reject(tmp_path_factory: pytest.TempPathFactory, values: list[object]):
    lines = [value.replace(b"\n", b"") if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    path = tmp_path_factory.mktemp("fuzz") / "s.jsonl"
    path.write_bytes(b"\n".join(lines))
    # A byte order mark and nothing else is an empty file.
    lines[:1] = [line.removeprefix(b"\xef\xbb\xbf") for line in lines[:1]]
    items = [item for item in read_mmc4(path) if isinstance(item, Document) or item.image_number is None]
    assert [item.source.line for item in items] == [
        number for number, line in enumerate(lines, start=1) if line.strip()
    ]


def test_real_documents_are_all_kept(shared_mmc4: Path):
    """Oracle: an independent reading of the zip files with the standard library."""
    shards = sorted((shared_mmc4 / "data").glob("*.zip"))
    expected = [
        json.loads(line)
        for shard in shards
        for line in zipfile.ZipFile(shard).read(shard.name.removesuffix(".zip")).splitlines()
    ]
    items = [item for shard in shards for item in read_mmc4(shard)]
    assert len(items) == len(expected) > 0
    for item, raw in zip(items, expected, strict=True):
        assert isinstance(item, Document)
        assert [segment.text for segment in item.segments] == [text.strip() for text in raw["text_list"]]
        assert sorted(image.name for image in item.images) == sorted(i["image_name"] for i in raw["image_info"])


@pytest.mark.parametrize(("flag", "text"), [(1, "encrypted"), (0, "damaged zip")])
def test_zip_that_cannot_be_read_is_an_oserror(tmp_path, flag, text):
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.jsonl", "x\n" * 500)
    data = bytearray(path.read_bytes())
    if flag:
        data[6] |= 1
        data[data.rfind(b"PK\x01\x02") + 8] |= 1
    else:
        data[60] ^= 0xFF
        data[55] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(OSError, match=text):
        list(read_lines(path))
