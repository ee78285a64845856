"""What a run shows of itself. Oracles: counts known beforehand, and the text that arrives."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest

from lcl_megatron.data.preprocessing import progress
from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.preprocessing.progress import (
    Counters,
    Progress,
    ShardReport,
    duration,
    read_position,
    report_path,
)
from lcl_megatron.data.storage.corpus_part import Totals
from tests.data.preprocess_runs import config, write_shards


def totals(documents: int, images: int, image_bytes: int, rejects: int) -> Totals:
    result = Totals(documents=documents, images=images, source_image_bytes=image_bytes)
    result.rejected_images["missing file"] += rejects
    return result


def test_counters_add_up_over_finished_shards_and_running_ones(tmp_path: Path, monkeypatch):
    """Four shards of 1000 bytes: one from an earlier run, one finished, one half read, one not begun."""
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.0)
    shard = tmp_path / "shard.jsonl"
    shard.write_bytes(bytes(1000))
    shown = Progress(io.StringIO())
    shown.begin([1000] * 4, done=1)
    assert shown.line().startswith(" 25%, time left unknown | 0.0 MB/s | 1/4 shards | 0 documents")
    for number in (1, 2, 3):
        shown.shard_started(tmp_path / f"part{number}")
    report = ShardReport(report_path(tmp_path / "part2"), shard)
    with open(shard, "rb", buffering=0) as stream:
        stream.read(500)
        report.tick(totals(7, 20, 4000, 2))
    shown.shard_finished(tmp_path / "part1", Counters.of(totals(10, 30, 6000, 1), 1000))
    line = shown.line()
    assert re.fullmatch(r" 62%, \d:\d\d left \| [\d,.]+ MB/s \| 2/4 shards \| 17 documents, 50 images, 3 rejects", line)
    shown.shard_finished(tmp_path / "part2", Counters.of(totals(14, 40, 8000, 4), 1000))
    assert shown.line().endswith(" MB/s | 3/4 shards | 24 documents, 70 images, 5 rejects")
    assert not report_path(tmp_path / "part2").exists()


def test_a_report_that_is_half_written_or_cannot_be_written_disturbs_nobody(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(progress, "REPORT_SECONDS", 0.0)
    assert Counters.unpack(Counters(1, 2, 3, 4, 5).pack()) == Counters(1, 2, 3, 4, 5)
    assert Counters.unpack(Counters(1, 2, 3, 4, 5).pack()[:-1]) == Counters()
    (tmp_path / "shard").write_bytes(b"x")
    ShardReport(tmp_path / "no folder" / "report", tmp_path / "shard").tick(Totals())


def test_the_position_is_that_of_the_open_file(tmp_path: Path):
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(bytes(100))
    other.write_bytes(bytes(100))
    assert read_position(path) == 0
    with open(path, "rb", buffering=0) as stream, open(other, "rb", buffering=0) as another:
        stream.read(30)
        another.read(60)
        assert read_position(path) == 30
    assert read_position(tmp_path / "absent") == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (-3, "0:00"), (59.6, "1:00"), (187, "3:07"), (18_729, "5:12:09")]
)
def test_durations(seconds: float, text: str):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show_until(stream: io.StringIO, sign: str) -> str:
    """Show a run of which half is done until the sign was shown four times; return all that was shown."""
    with Progress(stream) as shown:
        shown.begin([10, 10], done=1)
        while stream.getvalue().count(sign) < 4:
            time.sleep(0.01)
    return stream.getvalue()


def test_a_file_gets_lines_and_a_terminal_one_line_that_changes(monkeypatch):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.02)
    monkeypatch.setattr(progress, "TERMINAL_SECONDS", 0.02)
    monkeypatch.setenv("COLUMNS", "60")
    note = "taking up an interrupted run: 1 of 2 shards are done"
    lines = show_until(io.StringIO(), "\n").splitlines()
    assert lines[0] == note
    assert all(line.startswith(" 50%, time left unknown | ") and line.endswith(" rejects") for line in lines[1:])
    shown = show_until(Terminal(), "\r")
    assert shown.startswith(f"\r\x1b[K{note}\n\r 50%, time left unknown | ")
    updates = shown.partition("\n")[2].split("\r")[1:-1]
    assert len(set(updates)) == 1
    assert len(updates[0].removesuffix("\x1b[K")) == 59
    assert shown.endswith("\r\x1b[K")


def test_a_run_leaves_its_counts_in_the_line(mmc4, tokenizer_path, tmp_path):
    shown = Progress(io.StringIO())
    summary = preprocess(config(mmc4, write_shards(mmc4), tokenizer_path, tmp_path / "corpus"), shown)
    counts = summary.totals
    rejects = counts.rejected_documents.total() + counts.rejected_images.total()
    assert shown.line().startswith("100%, 0:00 left | ")
    assert shown.line().endswith(
        f" MB/s | 5/5 shards | {counts.documents} documents, {counts.images} images, {rejects} rejects"
    )
