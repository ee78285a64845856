"""Several corpora of one tokenizer to one corpus, as if all of their shards had been preprocessed together.

A corpus is handed to ``CorpusWriter`` as one part: its ``.bin`` files as links, its columns out of the ``.idx`` files
and side arrays. So every byte is copied once, an interrupted merge goes on with the first corpus that was not done,
and the result appears in one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lcl_megatron.config.errors import ConfigError, require
from lcl_megatron.data.preprocessing.preprocess_config import input_names
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import BLOBS, COLUMNS, Totals
from lcl_megatron.data.storage.corpus_writer import INDEXED, CorpusWriter
from lcl_megatron.data.storage.indexed_file import COPY_VALUES, IndexedFile


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Which corpora become one, and where it goes."""

    input: tuple[Path, ...]
    """Folders of corpora of the same tokenizer. Their order is the order of the result."""
    output: Path
    """Folder of the corpus to write."""
    verify: bool = True
    """Read every input once more and compare it with its checksums first: damage must not get new checksums."""
    overwrite: bool = False
    """Replace a corpus that is already at the output."""

    def __post_init__(self) -> None:
        require(len(self.input) > 0, "no input: give --input CORPUS [CORPUS ...]")
        paths = [os.path.realpath(path) for path in self.input]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        require(not twice, f"inputs given more than once: {', '.join(twice[:5])}")
        inside = os.path.realpath(self.output) in paths
        require(not inside, f"output = {self.output} is one of the inputs; choose another folder")


def merge_corpora(config: MergeConfig, report: Callable[[str], None] = lambda line: None) -> Corpus:
    """Write one corpus that holds the documents of all inputs, and return it opened.

    Its content files are, byte for byte, those of preprocessing all shards of the inputs in their order. Inputs,
    sources and rejects keep their names, unless two corpora use the same one: then each has the name of its corpus
    in front of all of its own.

    Args:
        config: What to do.
        report: Receives one line of progress for each corpus.

    Raises:
        ConfigError: If an input is no corpus, the tokenizers or the treatment of images differ, or the output exists.
        CorpusError: If an input is damaged.
    """
    corpora = [Corpus.open(path) for path in config.input]
    _check_alike(corpora)
    prefixes = _prefixes(corpora)
    settings = json.dumps(["merge", [corpus.fingerprint for corpus in corpora], prefixes])
    image_processing = corpora[0].manifest["image_processing"]
    with CorpusWriter(config.output, corpora[0].tokenizer, settings, config.overwrite, image_processing) as writer:
        ends = np.cumsum([len(corpus.manifest["inputs"]) for corpus in corpora])
        for number, (corpus, prefix, end) in enumerate(zip(corpora, prefixes, ends, strict=True)):
            if end > len(writer.inputs):
                if config.verify:
                    corpus.verify()
                writer.append(_link_part(corpus, prefix, writer.part_folder(number)))
            report(f"[{number + 1}/{len(corpora)}] {corpus.path}: {corpus.num_documents:,} documents")
        return writer.commit()


def _check_alike(corpora: Sequence[Corpus]) -> None:
    first = corpora[0]
    for corpus in corpora[1:]:
        if corpus.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise ConfigError(
                f"{corpus.path} was made by another tokenizer (fingerprint {corpus.tokenizer.fingerprint[:16]}) than "
                f"{first.path} ({first.tokenizer.fingerprint[:16]}); preprocess one of them with the other's tokenizer"
            )
        ours, theirs = (item.manifest["image_processing"] for item in (first, corpus))
        if ours != theirs:
            raise ConfigError(
                f"{corpus.path} treats images in another way ({theirs}) than {first.path} ({ours}); "
                "preprocess them alike"
            )


def _prefixes(corpora: Sequence[Corpus]) -> list[str]:
    """Return what stands in front of the file names of each corpus: nothing if no two corpora share a name."""
    used: Counter[str] = Counter()
    for corpus in corpora:
        used.update({entry["name"] for entry in (*_named(corpus.manifest["inputs"]), *corpus.manifest["sources"])})
    if max(used.values(), default=0) <= 1:
        return [""] * len(corpora)
    return [f"{name}/" for name in input_names([corpus.path for corpus in corpora])]


def _named(inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the inputs that have a name: those of ``write_corpus`` have none."""
    return [entry for entry in inputs if "name" in entry]


def _link_part(corpus: Corpus, prefix: str, folder: Path) -> Path:
    """Write a part that stands for a whole corpus, and return it."""
    staging = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for name in BLOBS:
        if name == "rejects.jsonl" and prefix:
            _rename_rejects(corpus.path / name, staging / name, prefix)
        else:
            os.symlink((corpus.path / name).absolute(), staging / name)
    columns: dict[str, np.ndarray] = {}
    for name, (lengths, per_document) in INDEXED.items():
        index = IndexedFile(corpus.path / name)
        columns |= {lengths: index.lengths, per_document: index.document_indices}
    for name, dtype in COLUMNS.items():
        if name in columns:
            _write_column(staging / name, columns[name], dtype, differences=name.startswith("document_"))
        else:
            _write_column(staging / name, _load(corpus.path / f"{name}.npy"), dtype, differences=False)
    inputs = corpus.manifest["inputs"]
    sources = corpus.manifest["sources"]
    part = {
        "inputs": [entry | {"name": prefix + entry["name"]} if "name" in entry else entry for entry in inputs],
        "sources": [prefix + source["name"] for source in sources],
        "source_inputs": [source["input"] for source in sources],
        "totals": vars(_totals(corpus.manifest)),
    }
    (staging / "part.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    # One may be left of a merge that ended while it was being appended.
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(staging, folder)
    return folder


def _write_column(path: Path, values: np.ndarray, dtype: str, differences: bool) -> None:
    """Write an array as a column; ``differences`` turns the borders of documents into counts per document."""
    with open(path, "wb") as stream:
        for begin in range(0, len(values) - differences, COPY_VALUES):
            chunk = values[begin : begin + COPY_VALUES + differences]
            stream.write((np.diff(chunk) if differences else chunk).astype(dtype).tobytes())


def _load(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, allow_pickle=False)
    return array


def _rename_rejects(source: Path, target: Path, prefix: str) -> None:
    with open(source, encoding="ascii") as lines, open(target, "w", encoding="ascii") as stream:
        for line in lines:
            record = json.loads(line)
            stream.write(json.dumps(record | {"file": prefix + record["file"]}, ensure_ascii=True) + "\n")


def _totals(manifest: dict[str, Any]) -> Totals:
    """Return the counts of a corpus, as far as its manifest has them."""
    low, high = manifest["tokenizer"]["token_range"]
    known = {
        **manifest["counts"],
        "min_token": low,
        "max_token": high,
        "document_lengths": manifest["document_lengths"],
        "document_images": manifest["document_images"],
        "rejected_documents": manifest["rejected"]["documents"],
        "rejected_images": manifest["rejected"]["images"],
    }
    return Totals.from_dict({item.name: known[item.name] for item in fields(Totals) if item.name in known})
