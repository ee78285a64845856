"""Caption tables. Oracles: tables written by the test, by hand and by csv.writer; rejects listed by hand."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, ImageKind, Reject
from lcl_megatron.data.readers import tsv as reader
from lcl_megatron.data.readers.formats import FORMATS
from lcl_megatron.data.readers.tsv import read_tsv


def write(path: Path, text: str | bytes) -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def pairs(path: Path, format: str = "tsv") -> list[tuple[int, str, str]]:
    """Line, image name and caption of every document; rejects are an error."""
    found = []
    for item in FORMATS[format].read(path, path.name):
        assert isinstance(item, Document), item
        (text,), (image,) = item.segments, item.images
        assert (image.kind, image.segment_index, image.number) == (ImageKind.MATCHED, 0, 0)
        found.append((item.source.line, image.name, text.text))
    return found


def rejects(path: Path, format: str = "tsv") -> list[tuple[int, str]]:
    return [(i.source.line, i.reason) for i in FORMATS[format].read(path, path.name) if isinstance(i, Reject)]


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz", "t.txt"])
def test_the_first_line_shows_the_columns(tmp_path, name: str):
    conceptual = 'a "red" boat .\thttps://a/1?x=2\r\n "b\thttp://a.jpg/ \n'
    assert pairs(write(tmp_path / name, conceptual)) == [
        (1, "https://a/1?x=2", 'a "red" boat .'),
        (2, "http://a.jpg/", '"b'),
    ]
    flickr = "1.jpg#0\tA boat .\n1.jpg#1\tA #2 boat\n\n2.jpg.1#3\tx\n"
    assert pairs(write(tmp_path / name, flickr)) == [
        (1, "1.jpg", "A boat ."),
        (2, "1.jpg", "A #2 boat"),
        (4, "2.jpg.1", "x"),
    ]
    plain = "d/1.png\tA boat.\tWith a tab.\n2#1.jpg\tB.\n3.jpg#4\tC."
    assert pairs(write(tmp_path / name, plain)) == [
        (1, "d/1.png", "A boat.\tWith a tab."),
        (2, "2#1.jpg", "B."),
        (3, "3.jpg#4", "C."),
    ]
    assert pairs(write(tmp_path / name, b"\xef\xbb\xbf1.JPG\tA.")) == [(1, "1.JPG", "A.")]
    assert pairs(write(tmp_path / name, "")) == []


def test_tabs_in_a_caption_before_the_image_belong_to_it(tmp_path):
    assert pairs(write(tmp_path / "t.tsv", "a\tb\thttps://a/1\n")) == [(1, "https://a/1", "a\tb")]


def test_the_layout_of_the_first_line_holds_for_all_lines(tmp_path):
    path = write(tmp_path / "t.tsv", "1.jpg\tA boat.\nB boat.\t2.jpg\n")
    assert pairs(path) == [(1, "1.jpg", "A boat."), (2, "B boat.", "2.jpg")]


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
CAPTION = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('"\t,\n '), max_size=20)
NAME = st.from_regex(r"[a-z0-9]{1,9}", fullmatch=True)


@given(
    st.lists(st.tuples(NAME, CAPTION.filter(str.strip), CELL, st.floats(0, 1)), max_size=6),
    st.permutations(["filepath", "title", "other", "similarity"]),
    st.sampled_from(["\t", ","]),
)
@settings(max_examples=120, deadline=None)
def test_what_csv_writes_is_read_back(tmp_path_factory, rows, header: list[str], delimiter: str):
    """Blank lines inside a caption are not kept, as outside of one."""
    rows = [(name, "\n".join(filter(str.strip, caption.split("\n"))), *rest) for name, caption, *rest in rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, header, delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(dict(zip(["filepath", "title", "other", "similarity"], row, strict=True)))
    path = write(tmp_path_factory.mktemp("csv") / "t.csv", buffer.getvalue())
    items = list(read_tsv(path))
    assert all(isinstance(item, Document) for item in items)
    assert [(i.images[0].name, i.segments[0].text, i.images[0].similarity) for i in items] == [
        (name, caption.strip(), similarity) for name, caption, _, similarity in rows
    ]


def test_a_header_without_similarity_and_in_any_case(tmp_path):
    path = write(tmp_path / "t.tsv", "Caption\tID\tURL\nA boat.\t7\thttps://a/1\n")
    (document,) = read_tsv(path)
    assert isinstance(document, Document)
    assert (document.images[0].similarity, document.source.line) == (1.0, 2)


@pytest.mark.parametrize(
    "line",
    [
        "a boat\tanother boat",
        "1.jpg\t2.jpg",
        "https://a/1\thttps://a/2",
        "no tab",
        "filepath\tcaptions",
        "1.jpg",
        b"\xe9.jpg\tA.",
        "https://a/1 is where\tit lies",
    ],
)
def test_a_first_line_that_shows_nothing_is_an_error_that_says_what_to_do(tmp_path, line: str | bytes):
    path = write(tmp_path / "t.tsv", line)
    with pytest.raises(ConfigError, match=r"t.tsv: the first line does not show .* --format tsv-image-caption or"):
        list(read_tsv(path))


def test_the_layout_can_be_said(tmp_path):
    path = write(tmp_path / "t.tsv", "one\ttwo\nfilepath\ttitle\n1.jpg#0\tx\n")
    lines = [("one", "two"), ("filepath", "title"), ("1.jpg#0", "x")]
    assert [pair[1:] for pair in pairs(path, "tsv-image-caption")] == lines
    assert [pair[1:] for pair in pairs(path, "tsv-caption-image")] == [(second, first) for first, second in lines]


def test_a_bad_line_costs_only_itself(tmp_path, monkeypatch: pytest.MonkeyPatch):
    lines = [b"1.jpg\ta", b"no tab", b"2.jpg\t \t ", b"\tb", b"../3.jpg\tc", b"caf\xe9.jpg\td", b"4.jpg\te"]
    path = write(tmp_path / "t.tsv", b"\n".join(lines))
    assert rejects(path) == [
        (2, "wrong number of columns"),
        (3, "no caption"),
        (4, "unsafe image name"),
        (4, "no images"),
        (5, "unsafe image name"),
        (5, "no images"),
        (6, "not UTF-8"),
    ]
    assert sum(isinstance(item, Document) for item in read_tsv(path)) == 2


def test_a_bad_record_of_a_header_file_costs_only_itself(tmp_path):
    lines = [
        b"filepath\ttitle\tsimilarity",
        b"1.jpg\ta\t0.5",
        b"2.jpg\tb",
        b"3.jpg\tc\thigh",
        b"4.jpg\td\tnan",
        b'5.jpg\t"e" f\t0.5',
        b"6.jpg\tcaf\xe9\t0.5",
        b'7.jpg\t"g\t0.5',
        b"8.jpg\th\t",
        b"9.jpg\tcaf\xe9\t0.5",
        b"10.jpg\ti\t0.5",
    ]
    path = write(tmp_path / "t.tsv", b"\n".join(lines))
    assert rejects(path) == [
        (3, "wrong number of columns"),
        (4, "wrong type"),
        (5, "wrong type"),
        (6, "malformed CSV"),
        (7, "not UTF-8"),
        (8, "malformed CSV"),
        (10, "not UTF-8"),
    ]
    documents = [item for item in read_tsv(path) if isinstance(item, Document)]
    assert [(item.images[0].name, item.images[0].similarity) for item in documents] == [
        ("1.jpg", 0.5),
        ("8.jpg", 1.0),
        ("10.jpg", 0.5),
    ]


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "MAX_RECORD_LINES", 4)
    lines = ["title,filepath", '"a,1.jpg', *(f"b{n},{n}.jpg" for n in range(10)), '"c', 'd",2.jpg', '"e,3.jpg']
    path = write(tmp_path / "t.csv", "\n".join(lines))
    items = list(read_tsv(path))
    assert [(item.source.line, item.reason) for item in items if isinstance(item, Reject)] == [
        (2, "malformed CSV"),
        (15, "malformed CSV"),
    ]
    texts = [item.segments[0].text for item in items if isinstance(item, Document)]
    assert texts == [*(f"b{n}" for n in range(10)), "c\nd"]


LINE = st.text('a.jpg\t",#0 \u00e9', max_size=12).map(str.encode) | st.binary(max_size=12)


@given(st.lists(LINE.map(lambda line: line.replace(b"\n", b"")), max_size=8), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_line_is_a_document_or_a_reject(tmp_path_factory, lines: list[bytes], header: bool):
    """With a header, one record may take several lines; none is left out, and each begins where one begins."""
    lines = [b"filepath\ttitle", *lines] if header else lines
    path = write(tmp_path_factory.mktemp("fuzz") / "t.tsv", b"\n".join(lines))
    format = "tsv" if header else "tsv-image-caption"
    items = [i for i in FORMATS[format].read(path, "t.tsv") if isinstance(i, Document) or i.image_number is None]
    # A byte order mark and nothing else is an empty file.
    lines[:1] = [line.removeprefix(b"\xef\xbb\xbf") for line in lines[:1]]
    filled = [number for number, line in enumerate(lines, start=1) if line.strip()][header:]
    found = [item.source.line for item in items]
    if header:
        assert found == sorted(set(found))
        assert set(found) <= set(filled)
        assert found[:1] == filled[:1]
    else:
        assert found == filled


def test_every_file_of_a_zip_has_its_own_layout(tmp_path):
    path = tmp_path / "t.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.tsv", "1.jpg\tA.\n")
        archive.writestr("b.tsv", "B.\t2.jpg\n")
    items = [item for item in read_tsv(path) if isinstance(item, Document)]
    assert [(str(item.source), item.images[0].name) for item in items] == [
        ("t.zip/a.tsv:1", "1.jpg"),
        ("t.zip/b.tsv:1", "2.jpg"),
    ]
