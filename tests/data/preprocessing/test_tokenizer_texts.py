"""Texts for a tokenizer. Oracle: the texts that were put into the files, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, Source, TextSegment
from lcl_megatron.data.preprocessing.tokenizer_texts import training_texts
from lcl_megatron.data.readers.formats import FORMATS, Format


def test_texts_come_from_shards_and_text_files_in_equal_numbers(mmc4, record, tmp_path: Path):
    mmc4.add_image("a.png")
    lines = [record([f"{n} one.", f"{n} two."], [("a.png", 0, 0.5)]) for n in range(5)]
    shards = [mmc4.add_shard("0.jsonl", [b"{broken", *lines]), mmc4.add_shard("1.jsonl.zip", lines[:1])]
    (tmp_path / "b.txt").write_text("".join(f" line {n} \n" for n in range(9)))
    texts = list(training_texts([*shards, tmp_path / "b.txt"], 9))
    assert texts == ["0 one.", "0 two.", "1 one.", "0 one.", "0 two.", "line 0", "line 1", "line 2"]


def test_any_format_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read(path: Path, name: str):
        yield Document((TextSegment(path.read_text()), TextSegment(name)), (), Source(name, 1))

    monkeypatch.setitem(FORMATS, "plain", Format(read, brings_images=True, suffixes=(".p", ".q")))
    for name in ("a.p", "b.q"):
        (tmp_path / name).write_text(f"content of {name}")
    texts = training_texts([tmp_path / "a.p", tmp_path / "b.q"], 10, "plain")
    assert list(texts) == ["content of a.p", "a.p", "content of b.q", "b.q"]
    with pytest.raises(ConfigError, match=r"c.jsonl is neither of format plain \(.p, .q\) nor .txt"):
        list(training_texts([tmp_path / "c.jsonl"], 10, "plain"))
    with pytest.raises(ConfigError, match="format = 'mmc5' is unknown; known are .*mmc4, .*plain"):
        list(training_texts([tmp_path / "a.p"], 10, "mmc5"))
