"""Oracles: the table built in memory; the files on disk."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcl_megatron.config import DataConfig
from lcl_megatron.data.planning import table_cache
from lcl_megatron.data.planning.build_table import BuiltTable, build_table
from lcl_megatron.data.planning.compose import Composer, DocumentSizes
from lcl_megatron.data.planning.table_cache import open_table
from lcl_megatron.data.storage.corpus import Corpus
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, write


@pytest.fixture
def written(tmp_path: Path) -> WrittenCorpus:
    return write(tmp_path, random_documents(200, 8))


@pytest.fixture(autouse=True)
def small_corpora_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "CACHED_DOCUMENTS", 0)


def composer(corpus: Corpus, **settings: Any) -> Composer:
    return Composer(corpus, DataConfig(seq_length=96, **settings), NUM_LATENTS, 1)


def assert_same(found: BuiltTable, expected: BuiltTable) -> None:
    assert type(found.table) is type(expected.table)
    assert found.left_out == expected.left_out
    for name, array in expected.table.arrays().items():
        assert np.array_equal(found.table.arrays()[name], array), name
        assert found.table.arrays()[name].dtype == array.dtype


def folders(written: WrittenCorpus) -> list[Path]:
    return sorted(path for path in written.corpus.path.with_name("corpus.cache").iterdir() if path.is_dir())


@pytest.mark.parametrize("layout", ["packed", "pad", "window"])
def test_stored_table_equals_the_built_one(written: WrittenCorpus, layout: str, caplog: Any) -> None:
    caplog.set_level("INFO")
    expected = build_table(composer(written.corpus, layout=layout))
    assert_same(open_table(composer(written.corpus, layout=layout)), expected)
    assert_same(open_table(composer(written.corpus, layout=layout)), expected)
    assert caplog.text.count("planning the rows") == 1
    assert len(folders(written)) == 1


def test_what_decides_rows_has_its_own_table_and_the_seed_has_not(written: WrittenCorpus) -> None:
    open_table(composer(written.corpus))
    open_table(Composer(written.corpus, DataConfig(seq_length=96), NUM_LATENTS, 77))
    assert len(folders(written)) == 1
    open_table(composer(written.corpus, max_images_per_document=2))
    assert len(folders(written)) == 2


@pytest.mark.parametrize("layout", ["packed", "pad", "window"])
def test_a_table_kept_by_another_seed_is_the_one_that_would_be_built(written: WrittenCorpus, layout: str) -> None:
    open_table(composer(written.corpus, layout=layout))
    other = Composer(written.corpus, DataConfig(seq_length=96, layout=layout), NUM_LATENTS, 77)
    assert_same(open_table(other), build_table(other))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing array", "empty", "bad json"])
def test_a_damaged_table_is_built_again(written: WrittenCorpus, damage: str, caplog: Any) -> None:
    expected = build_table(composer(written.corpus))
    open_table(composer(written.corpus))
    (folder,) = folders(written)
    array, info = folder / "documents.npy", folder / "table.json"
    content = bytearray(array.read_bytes())
    content[-3] ^= 1
    if damage == "flip":
        array.write_bytes(content)
    elif damage == "cut":
        array.write_bytes(content[:-8])
    elif damage == "missing array":
        array.unlink()
    elif damage == "empty":
        info.unlink()
    else:
        info.write_text("[1")
    assert_same(open_table(composer(written.corpus)), expected)
    assert_same(open_table(composer(written.corpus)), expected)
    assert ("cannot be used" in caplog.text) == (damage in ("flip", "cut", "bad json"))


@pytest.mark.skipif(os.geteuid() == 0, reason="a superuser may write everywhere")
def test_where_nothing_can_be_written_the_table_stays_in_memory(written: WrittenCorpus, caplog: Any) -> None:
    written.corpus.path.parent.chmod(0o500)
    try:
        found = open_table(composer(written.corpus))
    finally:
        written.corpus.path.parent.chmod(0o700)
    assert_same(found, build_table(composer(written.corpus)))
    assert "set data.cache_dir" in caplog.text


def test_a_cache_folder_that_is_a_file_leaves_the_table_in_memory(
    written: WrittenCorpus, tmp_path: Path, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    found = open_table(composer(written.corpus, cache_dir=str(tmp_path / "file")))
    assert_same(found, build_table(composer(written.corpus)))
    assert "set data.cache_dir" in caplog.text


class CountingComposer(Composer):
    """A composer that knows how often it was asked for all sizes."""

    passes = 0

    def sizes(self, begin: int, end: int) -> DocumentSizes:
        self.passes += begin == 0
        return super().sizes(begin, end)


def test_a_table_that_cannot_be_written_to_its_end_is_built_once(written: WrittenCorpus, caplog: Any) -> None:
    """A limit on the size of files stands for a disk that is full: writing fails midway in the same manner."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    counting = CountingComposer(written.corpus, DataConfig(seq_length=96), NUM_LATENTS, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        found = open_table(counting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(found, build_table(composer(written.corpus)))
    assert counting.passes == 1
    assert "set data.cache_dir" in caplog.text
    assert [path.suffix for path in written.corpus.path.with_name("corpus.cache").iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_removed(written: WrittenCorpus) -> None:
    open_table(composer(written.corpus))
    (folder,) = folders(written)
    folder.rename(folder.with_name(f"{folder.name}.killed.tmp"))
    other = folder.with_name("0" * 32 + ".other.tmp")
    other.mkdir()
    assert_same(open_table(composer(written.corpus)), build_table(composer(written.corpus)))
    assert folders(written) == sorted([folder, other])


def test_cache_dir_is_used(written: WrittenCorpus, tmp_path: Path) -> None:
    open_table(composer(written.corpus, cache_dir=str(tmp_path / "elsewhere")))
    assert len(list((tmp_path / "elsewhere").glob("*/table.json"))) == 1
    assert not written.corpus.path.with_name("corpus.cache").exists()


def _open(path: Path) -> int:
    table_cache.CACHED_DOCUMENTS = 0
    return open_table(Composer(Corpus.open(path), DataConfig(seq_length=96), NUM_LATENTS, 1)).table.num_rows


def test_processes_that_ask_at_the_same_time_get_the_same(written: WrittenCorpus) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        found = pool.map(_open, [written.corpus.path] * 6)
    assert found == [build_table(composer(written.corpus)).table.num_rows] * 6
    cache = written.corpus.path.with_name("corpus.cache")
    assert sorted(path.suffix for path in cache.iterdir()) == ["", ".lock"]


def test_small_corpora_leave_no_files(written: WrittenCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cache, "CACHED_DOCUMENTS", 201)
    assert_same(open_table(composer(written.corpus)), build_table(composer(written.corpus)))
    assert not written.corpus.path.with_name("corpus.cache").exists()


def test_chunks_give_the_same_table(written: WrittenCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build_table(composer(written.corpus)).table.arrays()
    monkeypatch.setattr("lcl_megatron.data.planning.build_table.CHUNK_DOCUMENTS", 7)
    found = build_table(composer(written.corpus)).table.arrays()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_windows_composed_in_pieces_give_the_same_rows(written: WrittenCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build_table(composer(written.corpus, layout="window")).table.arrays()
    monkeypatch.setattr("lcl_megatron.data.planning.build_table.WINDOW_DOCUMENTS", 3)
    found = build_table(composer(written.corpus, layout="window")).table.arrays()
    for name, array in expected.items():
        assert np.array_equal(found[name], array), name


def test_settings_that_do_not_decide_rows_share_a_table(written: WrittenCorpus) -> None:
    config = DataConfig(seq_length=96)
    other = dataclasses.replace(config, num_workers=9, crop_scale=(0.5, 1.0), context_rule="index")
    keys = {table_cache.table_key(Composer(written.corpus, c, NUM_LATENTS, 0)) for c in (config, other)}
    assert len(keys) == 1
