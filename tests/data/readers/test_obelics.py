"""The OBELICS reader. Oracle: rows written by the test with pyarrow, read back; places counted by brute force."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, ImageKind, Reject
from lcl_megatron.data.readers.obelics import read_obelics

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

STRINGS = pa.list_(pa.string())
SCHEMA = {"images": STRINGS, "metadata": pa.string(), "general_metadata": pa.string(), "texts": STRINGS}


def write(path: Path, rows: list[dict[str, Any]], schema: dict[str, Any] = SCHEMA, **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(list(schema.items()))), path, **options)
    return path


def row(*items: str | tuple[str, ...], names: dict[int, str] | None = None) -> dict[str, Any]:
    """A row; an item is a text, or a tuple with the URL of an image."""
    metadata = [
        None if isinstance(item, str) else {"src": item[0]} | ({"local_name": names[i]} if names and i in names else {})
        for i, item in enumerate(items)
    ]
    return {
        "images": [None if isinstance(item, str) else item[0] for item in items],
        "texts": [item if isinstance(item, str) else None for item in items],
        "metadata": json.dumps(metadata),
        "general_metadata": "{}",
    }


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
URL = st.from_regex(r"https://[a-z]{1,9}/[a-z0-9%.?&=-]{0,20}", fullmatch=True).map(lambda url: (url,))


@given(st.lists(st.lists(TEXT | URL, max_size=7), max_size=5), st.integers(1, 4), st.sampled_from(["string", "large"]))
@settings(max_examples=60, deadline=None)
def test_documents_read_back(tmp_path_factory, documents, group: int, width: str):
    strings = pa.string() if width == "string" else pa.large_string()
    lists = pa.list_(strings) if width == "string" else pa.large_list(strings)
    schema = {"images": lists, "metadata": strings, "texts": lists}
    rows = [{key: value for key, value in row(*items).items() if key in schema} for items in documents]
    path = write(tmp_path_factory.mktemp("obelics") / "s.parquet", rows, schema, row_group_size=group)
    found = list(read_obelics(path, "part/s.parquet"))
    assert [str(item.source) for item in found] == [f"part/s.parquet:{n + 1}" for n in range(len(documents))]
    for item, items in zip(found, documents, strict=True):
        images = [
            (url[0], sum(isinstance(other, str) for other in items[:place]))
            for place, url in enumerate(items)
            if not isinstance(url, str)
        ]
        if not images:
            assert isinstance(item, Reject)
            assert item.reason == "no images"
            continue
        assert isinstance(item, Document)
        assert [segment.text for segment in item.segments] == [text.strip() for text in items if isinstance(text, str)]
        assert [(image.name, image.segment_index) for image in item.images] == images
        assert [image.number for image in item.images] == list(range(len(images)))
        assert all(image.kind is ImageKind.INLINE and image.similarity == 1.0 for image in item.images)


def test_a_local_name_takes_the_place_of_the_url(tmp_path):
    rows = [row(("https://a/1",), "Text.", ("https://a/2",), names={2: "2.jpg"})]
    (document,) = read_obelics(write(tmp_path / "s.parquet", rows))
    assert isinstance(document, Document)
    assert [image.name for image in document.images] == ["https://a/1", "2.jpg"]


@pytest.mark.parametrize("columns", [("images", "texts"), ("texts", "images", "metadata")])
def test_only_the_needed_columns_are_asked_for(tmp_path, columns: tuple[str, ...]):
    rows = [{key: value for key, value in row("a", ("https://a/1",)).items() if key in columns}]
    (document,) = read_obelics(write(tmp_path / "s.parquet", rows, {key: SCHEMA[key] for key in columns}))
    assert isinstance(document, Document)


GOOD = row("Text.", ("https://a/1",))
BAD = {
    "images null": (GOOD | {"images": None}, "wrong type", "images is null"),
    "texts null": (GOOD | {"texts": None}, "wrong type", "texts is null"),
    "lengths": (GOOD | {"texts": ["a"]}, "inconsistent record", "2 images and 1 texts"),
    "both": (GOOD | {"texts": ["a", "b"]}, "inconsistent record", "position 1 has an image and a text"),
    "neither": (GOOD | {"texts": [None, None]}, "inconsistent record", "position 0 has neither"),
    "metadata cut": (GOOD | {"metadata": '[{"local_name'}, "malformed JSON", ""),
    "metadata cut behind": (GOOD | {"metadata": '[{"local_name": "x"'}, "malformed JSON", ""),
    "metadata short": (GOOD | {"metadata": '[{"local_name": "x"}]'}, "inconsistent record", "not a list of 2 entries"),
    "metadata surrogate": (GOOD | {"metadata": r'[null, {"local_name": "\ud800"}]'}, "not UTF-8", "metadata[1]"),
    "no images": (row("Text."), "no images", ""),
    "empty": (row(), "no images", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_costs_only_itself(tmp_path, name: str):
    record, reason, detail = BAD[name]
    first, bad, last = read_obelics(write(tmp_path / "s.parquet", [GOOD, record, GOOD]))
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(bad, Reject)
    assert (bad.reason, str(bad.source)) == (reason, "s.parquet:2")
    assert detail in bad.detail


def test_text_that_is_not_utf8_costs_only_its_row(tmp_path):
    raw = {"images": [[None, b"https://a/1"]] * 3, "texts": [[b"a", None], [b"caf\xe9", None], [b"c", None]]}
    binary = pa.list_(pa.binary())
    arrays = [pa.array(raw[key], binary).cast(STRINGS, safe=False) for key in raw]
    table = pa.Table.from_arrays([pa.ListArray.from_arrays(a.offsets, a.values) for a in arrays], names=list(raw))
    pq.write_table(table, tmp_path / "s.parquet")
    first, bad, last = read_obelics(tmp_path / "s.parquet")
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(bad, Reject)
    assert (bad.reason, bad.detail) == ("not UTF-8", "texts[0]: unexpected end of data at 3")


def test_a_name_that_could_leave_the_folder_costs_the_image_only(tmp_path):
    rows = [row(("https://a/../b",), ("https://a/2",), "Text.", names={1: "../2.jpg"})]
    reject, document = read_obelics(write(tmp_path / "s.parquet", rows))
    assert isinstance(reject, Reject)
    assert isinstance(document, Document)
    assert (reject.reason, reject.image_number, reject.image_name) == ("unsafe image name", 1, "../2.jpg")
    # A URL is looked up by its hash and is never a path.
    assert [image.name for image in document.images] == ["https://a/../b"]


def test_another_table_is_named_with_its_columns(tmp_path):
    path = write(tmp_path / "s.parquet", [{"url": "a", "texts": "b"}], {"url": pa.string(), "texts": pa.string()})
    with pytest.raises(ConfigError, match=r"s.parquet is not an OBELICS shard: its columns are url: string, "):
        list(read_obelics(path))


def test_a_damaged_file_stops_with_its_name(tmp_path):
    path = write(tmp_path / "s.parquet", [row(str(n) * 50, (f"https://a/{n}",)) for n in range(500)])
    data = path.read_bytes()
    broken = bytearray(data)
    broken[8:2000] = bytes(1992)
    for content in (b"", b"<html>404</html>", data[: len(data) // 2], bytes(broken)):
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"s.parquet is a damaged parquet file .*; fetch it again or leave it out"):
            list(read_obelics(path))


def test_memory_does_not_grow_with_the_row_group(tmp_path):
    """One row group of 100 MB, read in a process of its own; pyarrow reports the most that it held."""
    rng = random.Random(0)
    rows = [row(rng.randbytes(10_000).hex(), (f"https://a/{n}",)) for n in range(5000)]
    path = write(tmp_path / "s.parquet", rows, use_dictionary=False, compression="none")
    assert path.stat().st_size > 100_000_000
    script = """
import sys
from pathlib import Path
from lcl_megatron.data.readers.obelics import read_obelics
count = sum(1 for _ in read_obelics(Path(sys.argv[1])))
import pyarrow
print(count, pyarrow.default_memory_pool().max_memory())
"""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    count, held = map(int, done.stdout.split())
    assert count == 5000
    assert held < 40_000_000, held


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "s.parquet", [GOOD])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow .*; pip install 'lcl_megatron\[obelics\]'"):
        list(read_obelics(path))
