"""Corpus writer and reader.

Oracles: the documents that were written, megatron-core's ``IndexedDataset`` and its builder, SHA-256 from hashlib, and
for damage every single file cut, grown or exchanged.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import ImageKind, ImageSegment, Source
from lcl_megatron.data.storage.corpus import CONTENT_FILES, Corpus, load_array, manifest_hash
from lcl_megatron.data.storage.corpus_part import EncodedDocument, StoredImage
from lcl_megatron.data.storage.corpus_writer import write_corpus
from lcl_megatron.data.storage.indexed_file import CorpusError
from lcl_megatron.data.tokenizer import PIECES, Tokenizer, train_tokenizer
from tests.data.encoded_documents import expected, make_documents, read_documents


@pytest.fixture
def documents(tokenizer: Tokenizer) -> list[EncodedDocument]:
    return make_documents(20, tokenizer.vocab_size)


@pytest.fixture
def corpus(tmp_path: Path, documents: list[EncodedDocument], tokenizer: Tokenizer) -> Corpus:
    return write_corpus(tmp_path / "corpus", iter(documents), tokenizer)


def test_what_was_written_reads_back(corpus: Corpus, documents: list[EncodedDocument], tokenizer: Tokenizer):
    assert read_documents(corpus) == expected(documents)
    assert corpus.num_documents == 20
    assert corpus.num_images == sum(len(document.images) for document in documents)
    assert (corpus.vocab_size, corpus.special_tokens) == (tokenizer.vocab_size, tokenizer.special_tokens)
    assert corpus.image_source(0).startswith(str(next(d for d in documents if d.images).source) + " image 5 (")
    dtypes = [
        getattr(corpus, name).dtype
        for name in (
            "document_segments",
            "segment_lengths",
            "document_images",
            "image_segment",
            "image_similarity",
            "image_width",
            "image_height",
            "image_kind",
            "image_hash",
        )
    ]
    assert dtypes == ["int64", "int32", "int64", "int32", "float32", "int32", "int32", "uint8", "uint64"]
    assert corpus.segment_tokens(0).dtype == np.int32
    assert sorted(path.name for path in corpus.path.parent.iterdir()) == ["corpus"]


def test_the_document_of_an_image_is_found(tmp_path: Path, tokenizer: Tokenizer):
    for number, counts in enumerate(([0, 3, 0, 0, 1, 2, 0], [1], [0, 4], [2] * 16 + [0] * 16)):
        documents = [
            EncodedDocument(
                [[9]],
                [StoredImage(ImageSegment("x", i, 0, 1.0, ImageKind.MATCHED), b"x", 1, 1) for i in range(count)],
                Source("d", line + 1),
            )
            for line, count in enumerate(counts)
        ]
        corpus = write_corpus(tmp_path / str(number), documents, tokenizer)
        images = np.random.default_rng(0).integers(0, sum(counts), 50)
        assert np.array_equal(corpus.image_documents(images), np.repeat(np.arange(len(counts)), counts)[images])


@pytest.mark.parametrize("name", ["tokens", "images"])
def test_megatron_core_reads_the_files(corpus: Corpus, documents: list[EncodedDocument], name: str):
    dataset = IndexedDataset(str(corpus.path / name))
    if name == "tokens":
        sequences = [list(segment) for document in documents for segment in document.segments]
        counts = [len(document.segments) for document in documents]
    else:
        sequences = [list(image.data) for document in documents for image in document.images]
        counts = [len(document.images) for document in documents]
    assert len(dataset) == len(sequences)
    assert all(dataset[index].tolist() == values for index, values in enumerate(sequences))
    assert dataset.document_indices.tolist() == np.cumsum([0, *counts]).tolist()


def test_files_equal_those_of_megatron_cores_builder(tmp_path: Path, tokenizer: Tokenizer):
    documents = [document for document in make_documents(40, tokenizer.vocab_size) if any(map(len, document.segments))]
    corpus = write_corpus(tmp_path / "corpus", documents, tokenizer)
    builder = IndexedDatasetBuilder(str(tmp_path / "stock.bin"), dtype=np.uint16)
    for document in documents:
        values = np.concatenate([np.asarray(segment, np.int64) for segment in document.segments])
        builder.add_document(torch.from_numpy(values), [len(segment) for segment in document.segments])
    builder.finalize(str(tmp_path / "stock.idx"))
    for suffix in ("bin", "idx"):
        assert (corpus.path / f"tokens.{suffix}").read_bytes() == (tmp_path / f"stock.{suffix}").read_bytes()


def test_the_manifest_counts_and_hashes_every_file(corpus: Corpus, documents: list[EncodedDocument]):
    manifest = json.loads((corpus.path / "manifest.json").read_text(encoding="utf-8"))
    names = {path.name for path in corpus.path.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names == {*CONTENT_FILES, "rejects.jsonl"}
    for name, entry in manifest["files"].items():
        data = (corpus.path / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    tokens = [[token for segment in document.segments for token in segment] for document in documents]
    flat = [token for document in tokens for token in document]
    assert manifest["counts"] == {
        "documents": 20,
        "segments": sum(len(d.segments) for d in documents),
        "images": corpus.num_images,
        "resized_images": 0,
        "duplicate_images": 0,
        "tokens": len(flat),
        "image_bytes": sum(len(i.data) for d in documents for i in d.images),
        "source_image_bytes": sum(len(i.data) for d in documents for i in d.images),
    }
    assert manifest["tokenizer"]["token_range"] == [min(flat), max(flat)]
    for bound, count in manifest["document_lengths"].items():
        low = int(bound) // 2 if int(bound) > 1 else int(bound) - 1
        assert count == sum(low < len(document) <= int(bound) for document in tokens)
    assert sum(manifest["document_lengths"].values()) == 20
    assert manifest["document_images"] == {
        str(n): c for n in range(4) if (c := sum(len(d.images) == n for d in documents))
    }
    corpus.verify()


def test_equal_images_have_equal_hashes_and_are_counted(tmp_path: Path, tokenizer: Tokenizer):
    """Oracle: SHA-256 of hashlib, and a set of the bytes."""
    documents = make_documents(30, tokenizer.vocab_size)
    first = next(image for document in documents for image in document.images)
    documents += [EncodedDocument([[8]], [first, first], Source("again.jsonl", 1))]
    corpus = write_corpus(tmp_path / "corpus", documents, tokenizer)
    data = [corpus.image_bytes(image) for image in range(corpus.num_images)]
    assert corpus.image_hash.tolist() == [int.from_bytes(hashlib.sha256(d).digest()[:8], "little") for d in data]
    assert corpus.manifest["counts"]["duplicate_images"] == len(data) - len(set(data)) == 2


def test_the_fingerprint_names_the_content(tmp_path: Path, documents: list[EncodedDocument], tokenizer: Tokenizer):
    first = write_corpus(tmp_path / "a", documents, tokenizer)
    same = write_corpus(tmp_path / "b" / "c", documents, tokenizer)
    less = write_corpus(tmp_path / "d", documents[:-1], tokenizer)
    assert first.fingerprint == same.fingerprint != less.fingerprint


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of any size: special tokens, bytes, and numbered pieces."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    small = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ab ba abba"] * 20),
        model_writer=small,
        model_type="bpe",
        vocab_size=270,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=3,
        pad_piece=PIECES["pad"],
        minloglevel=2,
        control_symbols=[PIECES["boi"], PIECES["eoi"], PIECES["image"]],
    )
    model = proto.ModelProto()
    model.ParseFromString(small.getvalue())
    for number in range(vocab_size - len(model.pieces)):
        model.pieces.add(piece=f"\u2581p{number}", score=-1000.0 - number)
    return Tokenizer(model.SerializeToString())


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32), (70_000, np.int32)])
def test_large_vocabularies_do_not_wrap(tmp_path: Path, vocab_size: int, dtype: type):
    pytest.importorskip("google.protobuf")
    tokenizer = byte_tokenizer(vocab_size)
    assert tokenizer.vocab_size == vocab_size
    ids = [7, 65_498, vocab_size - 1]
    corpus = write_corpus(tmp_path / "corpus", [EncodedDocument([ids], [], Source("s.jsonl", 1))], tokenizer)
    assert corpus.segment_tokens(0).tolist() == ids
    stock = IndexedDataset(str(corpus.path / "tokens"))
    assert stock[0].tolist() == ids
    assert stock.index.dtype == dtype


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_outside_the_vocabulary_is_refused_when_written(tmp_path: Path, tokenizer: Tokenizer, token: int):
    document = EncodedDocument([[8, token]], [], Source("s.jsonl", 3))
    with pytest.raises(ValueError, match=rf"s.jsonl:3: token ids from .*vocabulary has {tokenizer.vocab_size}"):
        write_corpus(tmp_path / "corpus", [document], tokenizer)
    assert not (tmp_path / "corpus").exists()


def test_a_token_outside_the_vocabulary_is_refused_when_read(corpus: Corpus, documents: list[EncodedDocument]):
    segment = next(index for index, length in enumerate(corpus.segment_lengths) if length)
    values = np.fromfile(corpus.path / "tokens.bin", dtype=np.uint16)
    values[0] = 60_000
    values.tofile(corpus.path / "tokens.bin")
    damaged = Corpus.open(corpus.path)
    with pytest.raises(CorpusError, match=r"docs_shard_7.jsonl:\d+: segment .*60000"):
        damaged.segment_tokens(segment)
    with pytest.raises(CorpusError, match=r"tokens.bin differ"):
        damaged.verify()


def test_another_tokenizer_is_refused_by_name_of_both(tmp_path: Path, corpus: Corpus, tokenizer_path: Path):
    assert Corpus.open(corpus.path, tokenizer_path).fingerprint == corpus.fingerprint
    other = train_tokenizer(["quite another text about ships"], tmp_path / "other.model", 300)
    with pytest.raises(ConfigError) as error:
        Corpus.open(corpus.path, tmp_path / "other.model")
    assert other.fingerprint in str(error.value)
    assert corpus.tokenizer.fingerprint in str(error.value)


def test_no_corpus_is_a_clear_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no corpus at .*tools/preprocess_data.py"):
        Corpus.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", [*CONTENT_FILES, "rejects.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "grown", "missing"])
def test_damage_of_any_file_is_found_at_opening(corpus: Corpus, name: str, damage: str):
    file = corpus.path / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut" and not data:
        pytest.skip("an empty file cannot be cut")
    else:
        file.write_bytes(data[:-1] if damage == "cut" else data + b"\0")
    with pytest.raises((CorpusError, ConfigError), match=name):
        Corpus.open(corpus.path)


@pytest.mark.parametrize("name", CONTENT_FILES)
def test_a_flipped_bit_is_found_by_verify(corpus: Corpus, name: str):
    file = corpus.path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises((CorpusError, ConfigError, ValueError), match=name):
        corpus.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "version 99; this version reads"),
        (lambda m: m.update(format="other"), "format 'other'"),
        (lambda m: m.pop("counts"), "contradicts itself"),
        (lambda m: m["files"]["tokens.bin"].update(sha256="0" * 64), "contradicts itself"),
        (lambda m: m.update(sha25=m.pop("sha256")), "contradicts itself"),
        (lambda m: m["counts"].update(images=1), r"holds \d+ images; its manifest says 1"),
        (lambda m: m["tokenizer"].update(token_range=[0, 10**6]), "token ids from 0 to 1000000"),
        (lambda m: m["tokenizer"].update(vocab_size=5), "vocabulary of 5"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(corpus: Corpus, change, message: str):
    """Also with a hash that fits: what it says is compared with what is there."""
    manifest = json.loads((corpus.path / "manifest.json").read_text(encoding="utf-8"))
    change(manifest)
    if "sha256" in manifest:
        manifest["sha256"] = manifest_hash(manifest)
    (corpus.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises((CorpusError, ValueError), match=message):
        Corpus.open(corpus.path)


def test_a_changed_value_that_nothing_can_contradict_is_refused_by_the_manifests_own_hash(corpus: Corpus):
    path = corpus.path / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["counts"]["image_bytes"] += 1
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CorpusError, match="contradicts itself: it was changed after it was written"):
        Corpus.open(corpus.path)
    del manifest["sha256"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert Corpus.open(corpus.path).num_images == corpus.num_images, "corpora of earlier releases have no such hash"


def test_a_side_array_that_would_run_code_is_not_loaded(corpus: Corpus):
    np.save(corpus.path / "image_width.npy", np.array([print], dtype=object), allow_pickle=True)
    manifest = json.loads((corpus.path / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["image_width.npy"]["bytes"] = (corpus.path / "image_width.npy").stat().st_size
    manifest["sha256"] = manifest_hash(manifest)
    (corpus.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(CorpusError, match="image_width.npy holds Python objects, which are not loaded; expected int32"):
        Corpus.open(corpus.path)


def test_a_side_array_with_a_damaged_header_is_refused(corpus: Corpus):
    path = corpus.path / "image_width.npy"
    # Python's tokenizer reads the header; its error is no ValueError.
    path.write_bytes(path.read_bytes().replace(b"}", b"{", 1))
    with pytest.raises(CorpusError, match=r"image_width.npy is no array \(.*; expected int32 .*: it is damaged"):
        Corpus.open(corpus.path)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00\x10\x00nonsense"])
def test_a_side_array_that_is_none_is_refused(corpus: Corpus, content: bytes):
    path = corpus.path / "image_width.npy"
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"image_width\.npy is no array \(.*\); expected int32 \(3,\): it is damaged"):
        load_array(path, "int32", (3,))


def _read_in_child(corpus: Corpus, queue) -> None:
    queue.put((corpus.fingerprint, read_documents(corpus)))


def test_other_processes_read_the_same(corpus: Corpus, documents: list[EncodedDocument]):
    assert read_documents(pickle.loads(pickle.dumps(corpus))) == expected(documents)
    assert len(pickle.dumps(corpus)) < 2000
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=_read_in_child, args=(corpus, queue))
        process.start()
        assert queue.get(timeout=120) == (corpus.fingerprint, expected(documents))
        process.join()


def test_a_corpus_replaced_meanwhile_is_not_taken_for_the_old_one(corpus: Corpus, documents, tokenizer: Tokenizer):
    pickled = pickle.dumps(corpus)
    write_corpus(corpus.path, documents[:-1], tokenizer, overwrite=True)
    with pytest.raises(CorpusError, match="was replaced while in use"):
        pickle.loads(pickled)
    # Files that are open stay readable: the old folder is unlinked, not written over.
    assert read_documents(corpus) == expected(documents)


def test_a_corpus_is_not_overwritten_unasked(corpus: Corpus, documents, tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match=r"already holds a corpus; use --overwrite"):
        write_corpus(corpus.path, documents[:3], tokenizer)
    assert Corpus.open(corpus.path).fingerprint == corpus.fingerprint
    assert write_corpus(corpus.path, documents[:3], tokenizer, overwrite=True).num_documents == 3


def test_a_folder_that_is_no_corpus_is_never_replaced(tmp_path: Path, documents, tokenizer: Tokenizer):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is not a corpus"):
        write_corpus(tmp_path / "home", documents, tokenizer, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert write_corpus(tmp_path / "empty", documents, tokenizer).num_documents == 20


def test_no_document_means_no_corpus(tmp_path: Path, tokenizer: Tokenizer):
    with pytest.raises(ConfigError, match="no document was kept"):
        write_corpus(tmp_path / "corpus", [], tokenizer)
    assert not (tmp_path / "corpus").exists()


def test_an_error_while_overwriting_leaves_the_old_corpus(corpus: Corpus, documents, tokenizer: Tokenizer):
    def interrupted():
        yield from documents[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(corpus.path, interrupted(), tokenizer, overwrite=True)
    assert read_documents(Corpus.open(corpus.path)) == expected(documents)
    corpus.verify()


def test_a_corpus_can_be_moved(corpus: Corpus, documents: list[EncodedDocument], tmp_path: Path):
    shutil.move(corpus.path, tmp_path / "moved")
    assert read_documents(Corpus.open(str(tmp_path / "moved"))) == expected(documents)
