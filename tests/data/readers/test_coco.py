"""The COCO and Karpathy readers. Oracle: pairs written by the test, read back; rejects listed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, ImageKind, Reject
from lcl_megatron.data.readers.coco import read_coco
from lcl_megatron.data.readers.formats import FORMATS

CAPTION = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


def write(path: Path, value: Any) -> Path:
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


def pairs(path: Path) -> list[tuple[str, str]]:
    found = []
    for number, item in enumerate(read_coco(path, "c.json"), start=1):
        assert isinstance(item, Document), item
        (text,), (image,) = item.segments, item.images
        assert (image.kind, image.similarity, image.number, image.segment_index) == (ImageKind.MATCHED, 1.0, 0, 0)
        assert str(item.source) == f"c.json:{number}"
        found.append((image.name, text.text))
    return found


def rejects(path: Path, **options: Any) -> list[tuple[str, str]]:
    return [(item.source.line, item.reason) for item in read_coco(path, **options) if isinstance(item, Reject)]


@given(st.lists(st.lists(CAPTION, min_size=1, max_size=4), max_size=5))
@settings(max_examples=40, deadline=None)
def test_every_form_gives_every_pair(tmp_path_factory, captions: list[list[str]]):
    folder = tmp_path_factory.mktemp("coco")
    images = [{"id": 100 - n, "file_name": f"{n}.jpg", "license": 3} for n in range(len(captions))]
    annotations = [{"image_id": 100 - n, "id": 1, "caption": c} for n, texts in enumerate(captions) for c in texts]
    value = {"info": {}, "images": images[::-1], "annotations": annotations}
    expected = [(f"{n}.jpg", text.strip()) for n, texts in enumerate(captions) for text in texts]
    assert pairs(write(folder / "coco.json", value)) == expected
    listed = [{"image": f"{n}.jpg", "image_id": n, "caption": texts} for n, texts in enumerate(captions)]
    assert pairs(write(folder / "list.json", listed)) == expected
    single = [{"image": name, "caption": text} for name, text in expected]
    assert pairs(write(folder / "single.json", single)) == expected
    entries = [
        {"filepath": "val2014", "filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": t} for t in texts]}
        for n, texts in enumerate(captions)
    ]
    named = [(f"val2014/{name}", text) for name, text in expected]
    assert pairs(write(folder / "karpathy.json", {"dataset": "coco", "images": entries})) == named
    for entry in entries:
        del entry["filepath"]
    assert pairs(write(folder / "flickr.json", {"dataset": "flickr30k", "images": entries})) == expected


GOOD = {"image_id": 1, "caption": "A cat."}
ANNOTATIONS = {
    "a string": ("x", "wrong type"),
    "no image_id": ({"caption": "a"}, "missing field"),
    "image_id null": ({"image_id": None, "caption": "a"}, "wrong type"),
    "unknown image": ({"image_id": 9, "caption": "a"}, "no images"),
    "image_id of another type": ({"image_id": "1", "caption": "a"}, "no images"),
    "an image of two files": ({"image_id": 2, "caption": "a"}, "no images"),
    "an image without a file": ({"image_id": 3, "caption": "a"}, "no images"),
    "a file name with a surrogate": ({"image_id": 4, "caption": "a"}, "not UTF-8"),
    "no caption": ({"image_id": 1}, "missing field"),
    "caption null": ({"image_id": 1, "caption": None}, "wrong type"),
    "caption empty": ({"image_id": 1, "caption": " \n"}, "no caption"),
    "caption surrogate": ({"image_id": 1, "caption": "\ud800"}, "not UTF-8"),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_a_bad_annotation_costs_only_itself(tmp_path, name: str):
    entry, reason = ANNOTATIONS[name]
    images = [
        {"id": 1, "file_name": "1.jpg"},
        {"id": 2, "file_name": "2.jpg"},
        {"id": 2, "file_name": "2b.jpg"},
        {"id": 3},
        {"id": 4, "file_name": "\ud800.jpg"},
        "junk",
    ]
    path = write(tmp_path / "c.json", {"images": images, "annotations": [GOOD, entry, GOOD]})
    first, bad, last, *rest = read_coco(path)
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(bad, Reject)
    assert (bad.reason, str(bad.source)) == (reason, "c.json:2")
    # Images that no annotation speaks of follow.
    assert {item.reason for item in rest if isinstance(item, Reject)} == {"no caption"}
    assert len(rest) == 3 - (isinstance(entry, dict) and entry.get("image_id") in (2, 3, 4))


ENTRIES = {
    "a string": ("x", "wrong type"),
    "no image": ({"caption": "a"}, "missing field"),
    "image a number": ({"image": 3, "caption": "a"}, "wrong type"),
    "no caption": ({"image": "1.jpg"}, "missing field"),
    "caption null": ({"image": "1.jpg", "caption": None}, "wrong type"),
    "caption in list null": ({"image": "1.jpg", "caption": [None]}, "wrong type"),
    "captions empty": ({"image": "1.jpg", "caption": []}, "no caption"),
    "caption empty": ({"image": "1.jpg", "caption": [""]}, "no caption"),
    "no filename": ({"sentences": []}, "missing field"),
    "sentence without raw": ({"filename": "1.jpg", "sentences": [{"tokens": []}]}, "wrong type"),
    "sentences null": ({"filename": "1.jpg", "sentences": None}, "wrong type"),
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_bad_entry_costs_only_itself(tmp_path, name: str, wrapped: bool):
    entry, reason = ENTRIES[name]
    good = {"image": "0.jpg", "caption": "A cat."}
    entries = [good, entry, good]
    path = write(tmp_path / "c.json", {"images": entries} if wrapped else entries)
    first, bad, last = read_coco(path)
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(bad, Reject)
    assert (bad.reason, str(bad.source)) == (reason, "c.json:2")


def test_an_unsafe_name_leaves_no_document(tmp_path):
    path = write(tmp_path / "c.json", [{"image": "../1.jpg", "caption": "a"}])
    assert rejects(path) == [(1, "unsafe image name"), (1, "no images")]


def test_only_the_training_split_is_taken_where_asked(tmp_path):
    splits = ["train", "restval", "val", "test", None]
    entries = [{"filename": f"{s}.jpg", "split": s, "sentences": [{"raw": "a"}]} for s in splits]
    path = write(tmp_path / "c.json", {"images": entries})
    assert rejects(path) == []
    items = list(FORMATS["coco-train"].read(path, "c.json"))
    assert [item.images[0].name for item in items if isinstance(item, Document)] == ["train.jpg", "restval.jpg"]
    assert [str(item) for item in items if isinstance(item, Reject)] == [
        "c.json:3: other split: entry 2 is of split 'val'; read are train, restval",
        "c.json:4: other split: entry 3 is of split 'test'; read are train, restval",
        "c.json:5: other split: entry 4 is of split None; read are train, restval",
    ]


@pytest.mark.parametrize("content", [b"", b"[1, 2", b"<html>404</html>", b"\xff\xfe[]", b'[{"caption": NaN}]'])
def test_what_is_no_json_stops_with_its_name(tmp_path, content: bytes):
    with pytest.raises(OSError, match=r"c.json is not a JSON file .*; fetch it again or leave it out"):
        list(read_coco(write(tmp_path / "c.json", content)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "holds int; expected COCO's images and annotations"),
        (None, "holds null"),
        ({"captions": [], "image_urls": []}, r"holds an object with \['captions', 'image_urls'\]"),
        ({"images": [], "annotations": {}}, "annotations is dict; expected a list"),
        ({"images": [], "annotations": [{"bbox": []}]}, "no annotation has a caption; give captions_"),
    ],
)
def test_another_json_file_is_a_wrong_input(tmp_path, value: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        list(read_coco(write(tmp_path / "c.json", value)))
