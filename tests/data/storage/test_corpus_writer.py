"""Writing a corpus through crashes and in company. Oracle: an undisturbed write of the same documents."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Reject, Source
from lcl_megatron.data.storage import corpus_writer
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument, PartWriter
from lcl_megatron.data.storage.corpus_writer import CorpusWriter, count_duplicates, write_corpus
from lcl_megatron.data.tokenizer import Tokenizer
from tests.data.encoded_documents import expected, make_documents, read_documents
from tests.data.preprocess_runs import tree_hash

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "tempfile.mkdtemp"}
"""Audit events of Python that stand before an operation that changes files, or that opens one to be changed."""


def test_two_writers_of_one_corpus_do_not_mix(tmp_path: Path, tokenizer: Tokenizer):
    with CorpusWriter(tmp_path / "corpus", tokenizer), pytest.raises(ConfigError, match="another process is writing"):
        CorpusWriter(tmp_path / "corpus", tokenizer).__enter__()


def write_parts(writer: CorpusWriter, shards: list[list[EncodedDocument]], vocab_size: int, first: int) -> None:
    for number, shard in list(enumerate(shards))[first:]:
        if not writer.part_folder(number).exists():
            with PartWriter(writer.part_folder(number), vocab_size, {"name": f"s{number}", "bytes": 1}) as part:
                for document in shard:
                    part.add(document)
        writer.append(writer.part_folder(number))


def write_all(writer: CorpusWriter, shards: list[list[EncodedDocument]], vocab_size: int) -> Corpus:
    with writer:
        write_parts(writer, shards, vocab_size, len(writer.inputs))
        return writer.commit()


def count_events_until_killed(work: Callable[[], object], last: int) -> tuple[int, int]:
    """Do some work in a child that kills itself before its ``last``-th operation on files.

    Returns the number of operations done, and the signal that ended the child; 0 if it ended by itself.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        run_child(work, last, write)
    os.close(write)
    with open(read, "rb") as stream:
        count = len(stream.read())
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return count, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def run_child(work: Callable[[], object], last: int, report: int) -> NoReturn:
    left = last

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in FILE_EVENTS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(report, b".")

    try:
        sys.addaudithook(hook)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def test_a_kill_before_any_file_operation_is_taken_up_without_loss(tmp_path: Path, tokenizer: Tokenizer):
    """SIGKILL before the n-th operation on files, for n = 1, 8, 15, ... while parts are written and appended, and for
    every n while an old corpus is replaced. At no time is there a corpus that is neither the old nor the new one.
    """
    size = tokenizer.vocab_size
    shards = [make_documents(3, size, seed, f"shard_{seed}.jsonl") for seed in range(2)]
    clean = tree_hash(write_all(CorpusWriter(tmp_path / "clean", tokenizer, "x"), shards, size).path)
    old = write_corpus(tmp_path / "old", make_documents(2, size, seed=9), tokenizer).path
    path = tmp_path / "corpus"
    signal_number, kills, number = signal.SIGKILL, 0, 1
    while signal_number:
        for left in tmp_path.glob("*corpus*"):
            shutil.rmtree(left)
        shutil.copytree(old, path)

        def work() -> None:
            write_all(CorpusWriter(path, tokenizer, "x", overwrite=True), shards, size)

        signal_number = count_events_until_killed(work, number)[1]
        writing = (tmp_path / ".corpus.partial" / "corpus").exists()
        complete = (tmp_path / ".corpus.partial" / "corpus" / "manifest.json").exists()
        found = path if path.exists() else tmp_path / ".corpus.replaced"
        assert tree_hash(found) in (clean, tree_hash(old))
        work()
        assert tree_hash(path) == clean
        assert sorted(entry.name for entry in tmp_path.glob("*corpus*")) == ["corpus"]
        kills += signal_number == signal.SIGKILL
        number += 1 if complete or (list(tmp_path.glob(".corpus.*")) and not writing) else 7
    assert kills > 60


class Crash(BaseException):
    """Stands for the end of the process at some system call."""


@pytest.mark.parametrize("call", range(0, 130, 8))
def test_a_failing_disk_is_taken_up_without_loss_or_repetition(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, call: int
):
    """The disk is cut off at the n-th flush while parts are appended; the second run must give the same bytes."""
    size = tokenizer.vocab_size
    shards = [make_documents(4, size, seed, f"shard_{seed}.jsonl") for seed in range(3)]
    clean = write_all(CorpusWriter(tmp_path / "clean", tokenizer, "x"), shards, size)
    flush, calls = corpus_writer.os.fsync, iter(range(10_000))

    def failing_flush(descriptor: int) -> None:
        if next(calls) == call:
            raise Crash
        flush(descriptor)

    monkeypatch.setattr(corpus_writer.os, "fsync", failing_flush)
    writer = CorpusWriter(tmp_path / "corpus", tokenizer, "x")
    with pytest.raises(Crash):
        write_all(writer, shards, size)
    done = len(writer.inputs)
    monkeypatch.undo()
    assert not (tmp_path / "corpus").exists()
    with CorpusWriter(tmp_path / "corpus", tokenizer, "x") as writer:
        assert len(writer.inputs) in (done, done - 1)
        write_parts(writer, shards, size, len(writer.inputs))
        corpus = writer.commit()
    assert (corpus.path / "manifest.json").read_bytes() == (clean.path / "manifest.json").read_bytes()
    corpus.verify()


def test_left_over_work_with_other_settings_is_discarded(tmp_path: Path, tokenizer: Tokenizer):
    documents = make_documents(6, tokenizer.vocab_size)
    with CorpusWriter(tmp_path / "corpus", tokenizer, "old") as writer:
        write_parts(writer, [documents[:2], documents[2:4]], tokenizer.vocab_size, 0)
    with CorpusWriter(tmp_path / "corpus", tokenizer, "new") as writer:
        assert writer.inputs == []
        write_parts(writer, [documents[4:]], tokenizer.vocab_size, 0)
        assert read_documents(writer.commit()) == expected(documents[4:])


def test_a_writer_that_was_given_up_but_still_runs_does_no_harm(tmp_path: Path, tokenizer: Tokenizer):
    """An old worker writes part 1 while, and after, the run that took over writes it too."""
    size = tokenizer.vocab_size
    shards = [make_documents(3, size, seed, f"shard_{seed}.jsonl") for seed in range(3)]
    clean = tree_hash(write_all(CorpusWriter(tmp_path / "clean", tokenizer, "x"), shards, size).path)
    with CorpusWriter(tmp_path / "corpus", tokenizer, "x") as writer:
        writer.part_folder(0).parent.mkdir(exist_ok=True)
        slow, late = (PartWriter(writer.part_folder(1), size, {"name": "s1", "bytes": 1}) for _ in range(2))
        other = PartWriter(writer.part_folder(2).with_name("000002-settings_of_another_run"), size, {})
        for part in (slow, late, other):
            part.__enter__()
            for document in shards[1]:
                part.add(document)
        with PartWriter(writer.part_folder(1), size, {"name": "s1", "bytes": 1}) as fast:
            for document in shards[1]:
                fast.add(document)
        slow.__exit__(None, None, None)
        other.__exit__(None, None, None)
        write_parts(writer, shards[:2], size, 0)
        late.__exit__(None, None, None)
        write_parts(writer, shards, size, 2)
        assert tree_hash(writer.commit().path) == clean


def test_a_finished_corpus_is_not_written_again_by_a_run_that_tidies_up(tmp_path: Path, tokenizer: Tokenizer):
    """The rename to the final name was the last thing that a killed run did. Oracle: the files' inode numbers."""
    size = tokenizer.vocab_size
    shards = [make_documents(3, size)]

    def write_without_tidying() -> None:
        writer = CorpusWriter(tmp_path / "corpus", tokenizer, "x")
        writer._tidy_up = lambda: os.kill(os.getpid(), signal.SIGKILL)
        write_all(writer, shards, size)

    assert count_events_until_killed(write_without_tidying, 1 << 30)[1] == signal.SIGKILL
    assert (tmp_path / ".corpus.partial").exists()
    inodes = [entry.stat().st_ino for entry in sorted((tmp_path / "corpus").iterdir())]
    with pytest.raises(ConfigError, match="already holds a corpus"):
        CorpusWriter(tmp_path / "corpus", tokenizer, "other settings")
    with pytest.raises(ConfigError, match="already holds a corpus"):
        write_corpus(tmp_path / "corpus", shards[0], tokenizer)
    with CorpusWriter(tmp_path / "corpus", tokenizer, "x") as writer:
        assert len(writer.inputs) == 1
        assert writer.commit().num_documents == 3
    assert [entry.stat().st_ino for entry in sorted((tmp_path / "corpus").iterdir())] == inodes
    assert not (tmp_path / ".corpus.partial").exists()


@pytest.mark.parametrize("size", [0, 1, 5, 3000])
def test_duplicates_are_counted(size: int):
    hashes = np.random.default_rng(size).integers(0, 2000, size, dtype=np.uint64)
    assert count_duplicates(hashes) == size - len(set(hashes.tolist()))


def test_a_full_disk_leaves_nothing_of_a_part(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_until_full():
        with PartWriter(tmp_path / "p", 100, {}) as part:
            for line in range(40):
                part.reject(Reject(Source("f", line), "reason", "detail"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))

    try:
        with pytest.raises(OSError, match="File too large"):
            write_until_full()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
