"""The webdataset reader. Oracle: samples written by the test, read back field by field; rejects listed by hand."""

from __future__ import annotations

import itertools
import json
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.data.document import Document, ImageKind, Reject
from lcl_megatron.data.image_stores.tar_members import split_name
from lcl_megatron.data.readers import webdataset as reader
from lcl_megatron.data.readers.webdataset import read_webdataset
from tests.data.tars import Member, sample, special, write_tar

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def described(item: Document | Reject) -> tuple[object, ...]:
    if isinstance(item, Reject):
        return (str(item.source), item.reason, item.image_number)
    (text,), (image,) = item.segments, item.images
    return (str(item.source), text.text, image.name, image.data, image.similarity)


@given(
    st.lists(
        st.tuples(st.binary(min_size=1, max_size=900), TEXT.filter(str.strip), st.none() | st.floats(-1, 1)), max_size=5
    ),
    st.permutations(["jpg", "json", "txt"]),
    st.sampled_from(["a.tar", "a.tar.gz"]),
)
@settings(max_examples=60, deadline=None)
def test_samples_read_back_in_any_order_of_their_members(tmp_path_factory, samples, order, name):
    members: list[Member] = []
    for number, (image, caption, similarity) in enumerate(samples):
        parts = {"jpg": image, "txt": caption.encode(), "json": json.dumps({"similarity": similarity}).encode()}
        members += [(f"{number:05d}.{extension}", parts[extension]) for extension in order]
    path = write_tar(tmp_path_factory.mktemp("tar") / name, members)
    assert [described(item) for item in read_webdataset(path, "s.tar")] == [
        (f"s.tar:{n + 1}", caption.strip(), f"{n:05d}.jpg", image, 1.0 if similarity is None else similarity)
        for n, (image, caption, similarity) in enumerate(samples)
    ]


@pytest.mark.parametrize("extension", ["jpg", "JPG", "jpeg", "png", "webp", "gif"])
def test_a_document_is_one_text_and_one_matched_image(tmp_path, extension: str):
    members = [
        ("d.1/a.txt", b" A cat.\n"),
        (f"d.1/a.{extension}", b"\xff\xd8"),
        ("d.1/a.cls", b"3"),
        ("d.1/a.seg.png", b"0"),
    ]
    (document,) = read_webdataset(write_tar(tmp_path / "0.tar", members))
    assert isinstance(document, Document)
    assert described(document) == ("0.tar:1", "A cat.", f"d.1/a.{extension}", b"\xff\xd8", 1.0)
    image = document.images[0]
    assert (image.kind, image.number, image.segment_index) == (ImageKind.MATCHED, 0, 0)


def test_the_caption_is_the_text_or_else_in_the_record(tmp_path):
    record = {"caption": "in the record", "similarity": 0.25, "NSFW": "UNLIKELY", "exif": "{}"}
    members = [*sample("0", b"x", "in the text", record), *sample("1", b"x", None, record)]
    texts = [described(item)[1] for item in read_webdataset(write_tar(tmp_path / "0.tar", members))]
    assert texts == ["in the text", "in the record"]


GOOD = sample("good", b"good", "Good.")
BAD: dict[str, tuple[list[Member], list[tuple[str, int | None]]]] = {
    "no image": ([("x.txt", b"a")], [("no images", None)]),
    "only a record": ([("x.json", b"{}")], [("no images", None)]),
    "unknown members": ([("x.bin", b"a"), ("x.cls", b"a")], [("no images", None)]),
    "no caption": ([("x.jpg", b"x")], [("no caption", None)]),
    "empty caption": (sample("x", b"x", " \n"), [("no caption", None)]),
    "null caption": (sample("x", b"x", None, {"caption": None}), [("no caption", None)]),
    "caption a number": (sample("x", b"x", None, {"caption": 3}), [("wrong type", None)]),
    "caption surrogate": (sample("x", b"x", None, {"caption": "\ud800"}), [("not UTF-8", None)]),
    "caption latin-1": ([("x.jpg", b"x"), ("x.txt", b"caf\xe9")], [("not UTF-8", None)]),
    "record cut": ([("x.jpg", b"x"), ("x.txt", b"a"), ("x.json", b"{")], [("malformed JSON", None)]),
    "record a list": ([("x.jpg", b"x"), ("x.txt", b"a"), ("x.json", b"[]")], [("wrong type", None)]),
    "record latin-1": ([("x.jpg", b"x"), ("x.txt", b"a"), ("x.json", b'"\xe9"')], [("not UTF-8", None)]),
    "similarity a string": (sample("x", b"x", "a", {"similarity": "0.3"}), [("wrong type", None)]),
    "similarity NaN": (sample("x", b"x", "a", {"similarity": float("nan")}), [("malformed JSON", None)]),
    "two images": ([("x.jpg", b"x"), ("x.png", b"x"), ("x.txt", b"a")], [("several images", None)]),
    "an image twice": ([("x.jpg", b"x"), ("x.jpg", b"y"), ("x.txt", b"a")], [("several images", None)]),
    "a text twice": ([("x.jpg", b"x"), ("x.txt", b"a"), ("x.txt", b"b")], [("several texts", None)]),
    "empty image": (sample("x", b"", "a"), [("not an image", 0), ("no images", None)]),
    "absolute": (sample("/x", b"x", "a"), [("unsafe image name", 0), ("no images", None)]),
    "parent": (sample("../x", b"x", "a"), [("unsafe image name", 0), ("no images", None)]),
    "inner parent": (sample("a/../../x", b"x", "a"), [("unsafe image name", 0), ("no images", None)]),
    "link": (
        [special("x.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("x.txt", b"a")],
        [("unreadable file", 0), ("no images", None)],
    ),
    "hard link": (
        [special("x.jpg", tarfile.LNKTYPE, "good.jpg"), ("x.txt", b"a")],
        [("unreadable file", 0), ("no images", None)],
    ),
    "device": (
        [special("x.jpg", tarfile.CHRTYPE), ("x.txt", b"a")],
        [("unreadable file", 0), ("no images", None)],
    ),
    "caption a link": (
        [("x.jpg", b"x"), special("x.txt", tarfile.SYMTYPE, "/etc/passwd")],
        [("unreadable file", None)],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_costs_only_itself(tmp_path, name: str):
    members, expected = BAD[name]
    path = write_tar(tmp_path / "0.tar", [*GOOD, *members, *sample("next", b"next", "Next.")])
    items = list(read_webdataset(path))
    assert [described(item)[1:] for item in items if isinstance(item, Reject)] == expected
    assert all(str(item.source) == "0.tar:2" for item in items[1:-1])
    assert [described(item)[:3] for item in items if isinstance(item, Document)] == [
        ("0.tar:1", "Good.", "good.jpg"),
        ("0.tar:3", "Next.", "next.jpg"),
    ]


@pytest.mark.parametrize("stray", ["._x.txt", "README", "sub/._x.jpg", "x."])
def test_a_file_of_no_sample_does_not_end_the_sample_around_it(tmp_path, stray: str):
    members = [("x.jpg", b"x"), (stray, b"junk"), ("x.txt", b"A cat.")]
    reject, document = read_webdataset(write_tar(tmp_path / "0.tar", members))
    assert isinstance(reject, Reject)
    assert str(reject) == f"0.tar:2: no sample: '{stray}' has no key and extension"
    assert described(document)[:2] == ("0.tar:1", "A cat.")


JUNK = st.binary(max_size=20) | st.sampled_from([b"{}", b'{"caption": "a"}', b'{"similarity": 2}', b"A cat."])
MEMBER = st.tuples(
    st.sampled_from(["a", "b", "d/a", "../a", "/a", "a b"]),
    st.sampled_from(["jpg", "png", "txt", "json", "cls", "JSON", "x.jpg"]),
    JUNK,
)


@given(st.lists(MEMBER, max_size=12))
@settings(max_examples=150, deadline=None)
def test_every_sample_is_a_document_or_a_reject(tmp_path_factory, members: list[tuple[str, str, bytes]]):
    path = write_tar(tmp_path_factory.mktemp("fuzz") / "s.tar", [(f"{k}.{e}", data) for k, e, data in members])
    items = [item for item in read_webdataset(path) if isinstance(item, Document) or item.image_number is None]
    samples = [key for key, _ in itertools.groupby(key for key, _, _ in members)]
    assert [item.source.line for item in items] == list(range(1, len(samples) + 1))


def test_members_that_are_too_large_are_not_read(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "MAX_IMAGE_BYTES", 100)
    monkeypatch.setattr(reader, "MAX_TEXT_BYTES", 50)
    members = [*sample("a", b"x" * 101, "a"), *sample("b", b"x" * 100, "b" * 51), *sample("c", b"x" * 100, "c" * 50)]
    items = list(read_webdataset(write_tar(tmp_path / "0.tar", members)))
    assert [str(item) for item in items[:3]] == [
        "0.tar:1 image 0 (a.jpg): file too large: 101 bytes; the limit is 100",
        "0.tar:1: no images: sample 'a' has no readable image",
        "0.tar:2: file too large: 'b.txt': 51 bytes; at most 50",
    ]
    assert described(items[3])[1] == "c" * 50


def test_nothing_is_written(tmp_path):
    path = write_tar(tmp_path / "sub.tar", sample("../escaped", b"x", "a") + sample("here", b"x", "a"))
    before = sorted(tmp_path.rglob("*"))
    list(read_webdataset(path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_tar_cut_short_stops_the_run(tmp_path):
    path = write_tar(tmp_path / "0.tar", [*sample("a", b"x" * 600, "a"), *sample("b", b"x" * 600, "b")])
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        between = archive.getmember("b.jpg").offset
    path.write_bytes(data[:between])
    with pytest.raises(OSError, match=r"0.tar is a damaged tar file \(it ends without an end mark"):
        list(read_webdataset(path))


@given(st.text(max_size=20))
def test_a_name_is_its_key_and_its_extension(name: str):
    key, extension = split_name(name)
    assert (f"{key}.{extension}".lower() == name.lower()) if extension else key == name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.b/c.seg.PNG", ("a.b/c", "seg.png")),
        ("./0001.jpg", ("./0001", "jpg")),
        (".hidden", (".hidden", "")),
        ("a/", ("a/", "")),
        ("a.", ("a.", "")),
        ("x\n.jpg", ("x\n", "jpg")),
    ],
)
def test_where_a_key_ends(name: str, parts: tuple[str, str]):
    assert split_name(name) == parts
