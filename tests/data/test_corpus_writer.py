"""Writing a corpus through crashes and in company. Oracle: an undisturbed write of the same documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data import corpus_writer
from lcl_megatron.data.corpus_part import EncodedDocument, PartWriter
from lcl_megatron.data.corpus_writer import CorpusWriter
from lcl_megatron.data.tokenizer import Tokenizer
from tests.data.encoded_documents import expected, make_documents, read_documents


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


def write_all(writer: CorpusWriter, shards: list[list[EncodedDocument]], vocab_size: int) -> None:
    with writer:
        write_parts(writer, shards, vocab_size, 0)
        writer.commit()


class Crash(BaseException):
    """Stands for the end of the process at some system call."""


@pytest.mark.parametrize("call", range(0, 130, 4))
def test_a_crash_at_any_point_is_taken_up_without_loss_or_repetition(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, call: int
):
    """The disk is cut off at the n-th flush while parts are appended; the second run must give the same bytes."""
    size = tokenizer.vocab_size
    shards = [make_documents(4, size, seed, f"shard_{seed}.jsonl") for seed in range(3)]
    with CorpusWriter(tmp_path / "clean", tokenizer, "x") as writer:
        write_parts(writer, shards, size, 0)
        clean = writer.commit()
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
