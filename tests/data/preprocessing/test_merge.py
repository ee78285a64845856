"""Several corpora to one. Oracle: preprocessing all shards together, file by file and field by field."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.preprocessing.merge import MergeConfig, merge_corpora
from lcl_megatron.data.preprocessing.preprocess import PreprocessConfig, preprocess
from lcl_megatron.data.storage.corpus import CONTENT_FILES, Corpus, manifest_hash
from lcl_megatron.data.storage.corpus_writer import write_corpus
from lcl_megatron.data.storage.indexed_file import CorpusError
from tests.data.corpora import random_documents, tiny_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture
def shards(mmc4, record) -> list[Path]:
    """Five shards with rejected lines and images; one holds nothing that is kept, one is zipped."""
    paths = []
    for shard, count in enumerate([3, 1, 0, 6, 2]):
        lines = []
        for number in range(count):
            names = [f"{shard}_{number}_{index}.png" for index in range(1 + number % 3)]
            for index, name in enumerate(names):
                if (number + index) % 3 != 2:
                    mmc4.add_image(name, 8 + number, 9 + index, seed=shard * 100 + number)
            texts = [f"A cat sees {number} things.", "", "The old dog."]
            lines.append(record(texts, [(name, index % 3, 0.2 + index / 10) for index, name in enumerate(names)]))
        lines.insert(1, b"{broken")
        paths.append(mmc4.add_shard(f"docs_shard_{shard}_v2.jsonl" + (".zip" if shard == 3 else ""), lines))
    return paths


def make(mmc4, shards: list[Path], tokenizer_path: Path, output: Path) -> Corpus:
    config = PreprocessConfig(
        input=tuple(shards),
        image_root=mmc4.images,
        tokenizer_model=tokenizer_path,
        output=output,
        max_rejected_image_share=1.0,
    )
    return preprocess(config).corpus


def contents(corpus: Corpus) -> dict[str, bytes]:
    return {name: (corpus.path / name).read_bytes() for name in (*CONTENT_FILES, "rejects.jsonl")}


@pytest.mark.parametrize(
    "groups", [[[0, 1], [2, 3], [4]], [[0], [1], [3], [4]], [[3, 2, 0], [4, 1]], [[0, 1, 2, 3, 4]]]
)
def test_the_result_is_what_preprocessing_all_shards_gives(mmc4, shards, tokenizer_path, tmp_path, groups):
    order = [number for group in groups for number in group]
    whole = make(mmc4, [shards[number] for number in order], tokenizer_path, tmp_path / "whole")
    inputs = []
    for number, group in enumerate(groups):
        inputs.append(tmp_path / f"corpus{number}")
        make(mmc4, [shards[shard] for shard in group], tokenizer_path, inputs[-1])
    before = {path: path.read_bytes() for folder in inputs for path in folder.iterdir()}
    merged = merge_corpora(MergeConfig(input=tuple(inputs), output=tmp_path / "merged"))
    assert contents(merged) == contents(whole)
    assert merged.fingerprint == whole.fingerprint
    assert merged.manifest == whole.manifest
    assert [merged.document_source(d) for d in range(merged.num_documents)] == [
        whole.document_source(d) for d in range(whole.num_documents)
    ]
    merged.verify()
    assert {path: path.read_bytes() for path in before} == before
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in inputs}
    assert left == {"merged", "whole", "mmc4"}


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 10**6)), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_corpora_are_joined(tmp_path_factory, sizes: list[tuple[int, int]]):
    """Documents without text or images, and images before and behind texts, written without preprocessing."""
    folder = tmp_path_factory.mktemp("merge")
    tokenizer = tiny_tokenizer(folder)
    groups = [random_documents(1 + count, seed) for count, seed in sizes]
    inputs = []
    for number, documents in enumerate(groups):
        inputs.append(write_corpus(folder / f"{number}", documents, tokenizer).path)
    merged = merge_corpora(MergeConfig(input=tuple(inputs), output=folder / "merged"))
    whole = write_corpus(folder / "whole", [document for group in groups for document in group], tokenizer)
    same = [name for name in CONTENT_FILES if name != "document_source.npy"]
    assert {name: contents(merged)[name] for name in same} == {name: contents(whole)[name] for name in same}
    for key in ("counts", "document_lengths", "document_images", "rejected", "tokenizer"):
        assert merged.manifest[key] == whole.manifest[key]
    sources = np.load(merged.path / "document_source.npy")
    assert sources[:, 0].tolist() == [number for number, group in enumerate(groups) for _ in group]


def test_names_that_two_corpora_use_get_the_name_of_their_corpus(mmc4, record, tokenizer_path, tmp_path):
    mmc4.add_image("a.png")
    good = record(["A cat."], [("a.png", 0, 0.5), ("absent.png", 0, 0.5)])
    for name in ("one", "two"):
        shard = mmc4.add_shard("docs.jsonl", [good, b"{broken"])
        make(mmc4, [shard], tokenizer_path, tmp_path / name)
    config = MergeConfig(input=(tmp_path / "one", tmp_path / "two"), output=tmp_path / "merged")
    merged = merge_corpora(config)
    assert [merged.document_source(document) for document in range(2)] == ["one/docs.jsonl:1", "two/docs.jsonl:1"]
    assert [entry["name"] for entry in merged.manifest["inputs"]] == ["one/docs.jsonl", "two/docs.jsonl"]
    assert [entry["input"] for entry in merged.manifest["sources"]] == [0, 1]
    rejects = [json.loads(line) for line in (merged.path / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["line"], reject["reason"]) for reject in rejects] == [
        ("one/docs.jsonl", 1, "missing file"),
        ("one/docs.jsonl", 2, "malformed JSON"),
        ("two/docs.jsonl", 1, "missing file"),
        ("two/docs.jsonl", 2, "malformed JSON"),
    ]


def test_an_interrupted_merge_goes_on_with_the_next_corpus(mmc4, shards, tokenizer_path, tmp_path):
    inputs = tuple(tmp_path / f"corpus{number}" for number in range(3))
    for folder, group in zip(inputs, ([0, 1], [2, 3], [4]), strict=True):
        make(mmc4, [shards[number] for number in group], tokenizer_path, folder)

    def stop(line: str) -> None:
        if line.startswith("[2/3]"):
            raise KeyboardInterrupt

    config = MergeConfig(input=inputs, output=tmp_path / "merged")
    with pytest.raises(KeyboardInterrupt):
        merge_corpora(config, stop)
    assert not (tmp_path / "merged").exists()
    # What is done is not read again: the first corpus may even be damaged meanwhile, as long as it opens.
    images = inputs[0] / "images.bin"
    good = images.read_bytes()
    images.write_bytes(bytes(len(good)))
    merged = merge_corpora(config)
    merged.verify()
    images.write_bytes(good)
    whole = merge_corpora(MergeConfig(input=inputs, output=tmp_path / "again"))
    assert contents(merged) == contents(whole)


@pytest.mark.parametrize("copies", range(0, 40, 7))
def test_a_merge_that_ends_anywhere_comes_to_the_same(mmc4, shards, tokenizer_path, tmp_path, monkeypatch, copies: int):
    inputs = tuple(tmp_path / f"corpus{number}" for number in range(2))
    for folder, group in zip(inputs, ([0, 1], [2, 3, 4]), strict=True):
        make(mmc4, [shards[number] for number in group], tokenizer_path, folder)
    whole = merge_corpora(MergeConfig(input=inputs, output=tmp_path / "whole"))
    copy, left = shutil.copyfileobj, [copies]

    def disk_full(*arguments: object) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        copy(*arguments)

    config = MergeConfig(input=inputs, output=tmp_path / "merged")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", disk_full)
        with pytest.raises(OSError, match="No space left"):
            merge_corpora(config)
    assert not (tmp_path / "merged").exists()
    assert contents(merge_corpora(config)) == contents(whole)


def test_a_damaged_input_gets_no_new_checksums(mmc4, shards, tokenizer_path, tmp_path):
    first = make(mmc4, shards[:2], tokenizer_path, tmp_path / "first")
    second = make(mmc4, shards[3:], tokenizer_path, tmp_path / "second")
    data = bytearray((second.path / "images.bin").read_bytes())
    data[50] ^= 1
    (second.path / "images.bin").write_bytes(data)
    config = {"input": (first.path, second.path), "output": tmp_path / "merged"}
    with pytest.raises(CorpusError, match=r"second: images.bin differ from the manifest"):
        merge_corpora(MergeConfig(**config))
    assert not (tmp_path / "merged").exists()
    merged = merge_corpora(MergeConfig(**config, verify=False))
    assert merged.num_documents == first.num_documents + second.num_documents


def test_what_does_not_fit_together_is_refused(mmc4, shards, tokenizer_path, tmp_path):
    first = make(mmc4, shards[:2], tokenizer_path, tmp_path / "first")
    other = write_corpus(tmp_path / "other", random_documents(3, 0), tiny_tokenizer(tmp_path))
    with pytest.raises(ConfigError, match=r"other was made by another tokenizer .* than .*first .*; preprocess one"):
        merge_corpora(MergeConfig(input=(first.path, other.path), output=tmp_path / "merged"))
    with pytest.raises(ConfigError, match="no input: give --input CORPUS"):
        MergeConfig(input=(), output=tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"inputs given more than once: .*first"):
        MergeConfig(input=(first.path, tmp_path / "." / "first"), output=tmp_path / "merged")
    with pytest.raises(ConfigError, match=r"output = .*first is one of the inputs; choose another folder"):
        MergeConfig(input=(first.path, other.path), output=first.path, overwrite=True)
    with pytest.raises(ConfigError, match=r"no corpus at .*absent"):
        merge_corpora(MergeConfig(input=(first.path, tmp_path / "absent"), output=tmp_path / "merged"))
    with pytest.raises(ConfigError, match=r"other already holds a corpus; use --overwrite"):
        merge_corpora(MergeConfig(input=(first.path,), output=other.path))


def test_corpora_whose_images_were_treated_in_another_way_are_refused(mmc4, shards, tokenizer_path, tmp_path):
    first = make(mmc4, shards[:2], tokenizer_path, tmp_path / "first")
    second = make(mmc4, shards[3:], tokenizer_path, tmp_path / "second")
    manifest = second.manifest | {"image_processing": {"resize_short_side": 224}}
    manifest["sha256"] = manifest_hash(manifest)
    (second.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"second treats images in another way \(\{'resize_short_side': 224\}\) than"):
        merge_corpora(MergeConfig(input=(first.path, second.path), output=tmp_path / "merged"))


def test_the_tool_joins_and_refuses(mmc4, shards, tokenizer_path, tmp_path):
    inputs = [make(mmc4, shards[:2], tokenizer_path, tmp_path / "a").path]
    inputs.append(make(mmc4, shards[3:], tokenizer_path, tmp_path / "b").path)
    command = [sys.executable, str(ROOT / "tools" / "merge_corpora.py"), "--input", *map(str, inputs), "--output"]
    done = subprocess.run([*command, str(tmp_path / "c")], cwd=ROOT, capture_output=True, text=True, check=True)
    merged = Corpus.open(tmp_path / "c")
    assert f"corpus {merged.path} (fingerprint {merged.fingerprint[:16]})" in done.stdout
    assert "[2/2]" in done.stderr
    again = subprocess.run([*command, str(tmp_path / "c")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (again.returncode, "Traceback" in again.stderr) == (1, False)
    assert "use --overwrite" in again.stderr
