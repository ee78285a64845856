"""Parts to corpus: append, keep a journal, publish under the final name in one rename.

While a corpus is written, everything lies in a folder beside it::

    .NAME.partial/
        lock            held by the writing process
        parts/          finished parts that wait for their turn
        corpus/         .bin files and rejects.jsonl, growing
        columns/        the other columns, growing
        inputs.jsonl    input and sources of every part appended so far, growing
        journal.json    sizes of all growing files, counts, and the settings they belong to

A part is deleted when the journal that includes it is on disk. After a crash the growing files are cut back to the
journal's sizes, so a finished part is never done again and never counted twice. No document is held in memory.

An existing corpus that is replaced moves to ``.NAME.replaced`` before the new one takes its name; whoever finds it
there alone moves it back. When the new one has its name, ``.NAME.partial`` becomes ``.NAME.done`` and is deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.storage.corpus import (
    CONTENT_FILES,
    FORMAT,
    FORMAT_VERSION,
    IMAGE_ARRAYS,
    Corpus,
    file_sha256,
    fingerprint,
    manifest_hash,
)
from lcl_megatron.data.storage.corpus_part import (
    BLOBS,
    COLUMNS,
    TEMPORARY,
    EncodedDocument,
    PartWriter,
    Totals,
    remove_part,
    sync,
    sync_folder,
    token_dtype,
)
from lcl_megatron.data.storage.folder_lock import lock_folder
from lcl_megatron.data.storage.indexed_file import write_index
from lcl_megatron.data.tokenizer import Tokenizer

INDEXED: dict[str, tuple[str, str]] = {
    "tokens": ("segment_lengths", "document_segments"),
    "images": ("image_lengths", "document_images"),
    "names": ("name_lengths", "document_images"),
}
"""Indexed files of a corpus, each with the columns of its sequence lengths and of its sequences per document."""


class CorpusWriter:
    """Builds one corpus out of parts. Use as a context manager, which holds the lock.

    Args:
        path: Folder of the corpus; appears when ``commit`` returns, and not before.
        tokenizer: Tokenizer that made the tokens.
        settings: Whatever else decides the content. Left-over work of a writer with other settings is discarded.
        overwrite: Replace a corpus that is already there.
        image_processing: How images were judged and made; stands in the manifest.

    Raises:
        ConfigError: If ``path`` exists and may not be replaced, or another process is writing it.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: Tokenizer,
        settings: str = "",
        overwrite: bool = False,
        image_processing: dict[str, Any] | None = None,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.staging = self.path.with_name(f".{self.path.name}.partial")
        """Folder of everything unfinished."""
        self.totals = Totals()
        """Counts of the parts appended so far."""
        self.inputs: list[dict[str, Any]] = []
        """Inputs of the parts appended so far, in order."""
        self.published = False
        """Whether the corpus is already in its place: an earlier run ended between publishing and tidying up."""
        self._tokenizer = tokenizer
        self._image_processing = image_processing or {}
        self._settings = f"{FORMAT_VERSION} {tokenizer.fingerprint} {json.dumps(self._image_processing)} {settings}"
        self._key = hashlib.sha256(self._settings.encode("utf-8")).hexdigest()[:16]
        self._overwrite = overwrite
        self._replaced = self.path.with_name(f".{self.path.name}.replaced")
        self._sources: list[dict[str, Any]] = []
        self._columns = self.staging / "columns"
        self._corpus = self.staging / "corpus"
        self._parts = self.staging / "parts"
        self._done = self.path.with_name(f".{self.path.name}.done")
        self._lock: BinaryIO | None = None
        # Left by a writer that was killed with all work done; here, because the check may well end this one.
        shutil.rmtree(self._done, ignore_errors=True)
        self._check_replaceable()

    def __enter__(self) -> CorpusWriter:
        self._lock = lock_folder(self.staging)
        try:
            self._take_up()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def part_folder(self, number: int) -> Path:
        """Return where the part of input ``number`` is to be written; it is complete if it exists.

        The name holds the settings: a worker of an earlier run that outlived it cannot bring in a part of its own.
        """
        return self._parts / f"{number:06d}-{self._key}"

    def discard(self) -> None:
        """Forget the work of an earlier writer and begin with nothing."""
        self.totals, self.inputs, self._sources, self.published = Totals(), [], [], False
        # First of all: without a journal, whatever is left of the files is no work to take up.
        (self.staging / "journal.json").unlink(missing_ok=True)
        self._check_replaceable()
        for folder in (self._corpus, self._columns, self._parts):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(exist_ok=True)
        for path in (*(self._growing(name) for name in (*BLOBS, *COLUMNS)), self.staging / "inputs.jsonl"):
            path.write_bytes(b"")
        self._write_journal()

    def append(self, part: Path) -> Totals:
        """Append a finished part, delete it, and return its counts."""
        info = json.loads((part / "part.json").read_text(encoding="utf-8"))
        totals = Totals.from_dict(info["totals"])
        base = len(self._sources)
        for name in (*BLOBS, *COLUMNS):
            with open(part / name, "rb") as source, open(self._growing(name), "ab") as target:
                if name == "document_source":
                    rows = np.fromfile(source, dtype=COLUMNS[name]).reshape(-1, 2) + np.array([base, 0])
                    target.write(rows.astype(COLUMNS[name]).tobytes())
                else:
                    shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
        self.totals.add(totals)
        self._add_inputs(info)
        with open(self.staging / "inputs.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(info | {"totals": None}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._write_journal()
        remove_part(part)
        return totals

    def commit(self) -> Corpus:
        """Write indices, side arrays and manifest, publish the folder, and return it opened.

        Raises:
            ConfigError: If not one document was kept, with the reasons; nothing is published then.
        """
        if self.totals.documents == 0:
            raise ConfigError(
                f"no document was kept, so {self.path} is not written; "
                f"documents left out: {dict(self.totals.rejected_documents)}, "
                f"images left out: {dict(self.totals.rejected_images)}"
            )
        if not self.published:
            self._complete()
            self._publish()
        self._tidy_up()
        return Corpus.open(self.path)

    def _complete(self) -> None:
        """Write what is still missing in the folder of the corpus; done again, it gives the same."""
        dtypes = {"tokens": token_dtype(self._tokenizer.vocab_size)}
        for name, (lengths, per_document) in INDEXED.items():
            write_index(
                self._corpus / f"{name}.idx",
                dtypes.get(name, np.dtype(np.uint8)),
                self._read_column(lengths),
                self._read_column(per_document),
            )
        for name in (*IMAGE_ARRAYS, "document_source"):
            self._write_array(name)
        (self._corpus / "tokenizer.model").write_bytes(self._tokenizer.model)
        content = self._manifest()
        manifest = json.dumps(content | {"sha256": manifest_hash(content)}, indent=1, ensure_ascii=False) + "\n"
        (self._corpus / "manifest.json").write_text(manifest, encoding="utf-8")
        sync_folder(self._corpus)

    def _check_replaceable(self) -> None:
        if not self.path.exists() or self._is_published():
            return
        if not self.path.is_dir() or (any(self.path.iterdir()) and not (self.path / "manifest.json").is_file()):
            raise ConfigError(f"{self.path} exists and is not a corpus; move it away or choose another --output")
        if any(self.path.iterdir()) and not self._overwrite:
            raise ConfigError(f"{self.path} already holds a corpus; use --overwrite to replace it")

    def _take_up(self) -> None:
        """Bring the folders of an earlier writer, ended at whatever moment, into a state to go on from."""
        if self._replaced.exists():
            if self.path.exists():
                shutil.rmtree(self._replaced)
            else:
                # It ended between the two renames of ``_publish``: the old corpus is back until the new one comes.
                os.rename(self._replaced, self.path)
        self._check_replaceable()
        self.published = self._is_published()
        if not self._resume():
            self.discard()
        for folder in self._parts.iterdir() if self._parts.is_dir() else ():
            number = folder.name.partition("-")[0]
            if folder.name.endswith(TEMPORARY) or (number.isdigit() and int(number) < len(self.inputs)):
                shutil.rmtree(folder, ignore_errors=True)

    def _is_published(self) -> bool:
        """Return whether an earlier writer of this corpus has published it and ended before it tidied up."""
        journal = self._read_journal()
        return journal is not None and not self._corpus.exists() and (self.path / "manifest.json").is_file()

    def _growing(self, name: str) -> Path:
        return (self._corpus if name in BLOBS else self._columns) / name

    def _write_journal(self) -> None:
        sizes = {name: self._growing(name).stat().st_size for name in (*BLOBS, *COLUMNS)}
        sizes["inputs.jsonl"] = (self.staging / "inputs.jsonl").stat().st_size
        journal = {"settings": self._settings, "sizes": sizes, "totals": vars(self.totals)}
        temporary = self.staging / "journal.tmp"
        with open(temporary, "w", encoding="utf-8") as stream:
            json.dump(journal, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(temporary, self.staging / "journal.json")
        # Parts are deleted after this: their deletion must not reach the disk before the journal does.
        sync(self.staging)

    def _read_journal(self) -> dict[str, Any] | None:
        """Return the journal of an earlier writer with the same settings, if there is one."""
        try:
            journal: dict[str, Any] = json.loads((self.staging / "journal.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return journal if journal.get("settings") == self._settings else None

    def _resume(self) -> bool:
        """Take up the work of a writer that ended early; False if there is none that fits."""
        journal = self._read_journal()
        if journal is None:
            return False
        if not self.published:
            sizes = {
                self.staging / name if name == "inputs.jsonl" else self._growing(name): size
                for name, size in journal["sizes"].items()
            }
            if any(not path.is_file() or path.stat().st_size < size for path, size in sizes.items()):
                return False
            for path, size in sizes.items():
                os.truncate(path, size)
        self.totals = Totals.from_dict(journal["totals"])
        for line in (self.staging / "inputs.jsonl").read_text(encoding="utf-8").splitlines():
            self._add_inputs(json.loads(line))
        return True

    def _add_inputs(self, info: dict[str, Any]) -> None:
        """Note inputs and sources of a part: one input, or the several of a merged corpus."""
        first = len(self.inputs)
        self.inputs.extend(info.get("inputs") or [info["input"]])
        of_inputs = info.get("source_inputs") or [0] * len(info["sources"])
        for name, number in zip(info["sources"], of_inputs, strict=True):
            self._sources.append({"name": name, "input": first + number})

    def _read_column(self, name: str) -> np.ndarray:
        path, dtype = self._growing(name), np.dtype(COLUMNS[name])
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)

    def _write_array(self, name: str) -> None:
        shape = (self.totals.documents, 2) if name == "document_source" else (self.totals.images,)
        descr = np.lib.format.dtype_to_descr(np.dtype(COLUMNS[name]))
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        with open(self._growing(name), "rb") as source, open(self._corpus / f"{name}.npy", "wb") as target:
            np.lib.format.write_array_header_1_0(target, header)
            shutil.copyfileobj(source, target, 1 << 20)

    def _manifest(self) -> dict[str, Any]:
        names = sorted((*CONTENT_FILES, "rejects.jsonl"))
        with ThreadPoolExecutor(4) as pool:
            hashes = list(pool.map(lambda name: file_sha256(self._corpus / name), names))
        files = {
            name: {"bytes": (self._corpus / name).stat().st_size, "sha256": value}
            for name, value in zip(names, hashes, strict=True)
        }
        totals = self.totals
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(files),
            "tokenizer": {
                "fingerprint": self._tokenizer.fingerprint,
                "vocab_size": self._tokenizer.vocab_size,
                "special_tokens": vars(self._tokenizer.special_tokens),
                "token_range": [totals.min_token, totals.max_token],
            },
            "image_processing": self._image_processing,
            "counts": {
                "documents": totals.documents,
                "segments": totals.segments,
                "images": totals.images,
                "resized_images": totals.resized_images,
                "duplicate_images": count_duplicates(self._read_column("image_hash")),
                "tokens": totals.tokens,
                "image_bytes": totals.image_bytes,
                "source_image_bytes": totals.source_image_bytes,
            },
            "document_lengths": _sorted_counts(totals.document_lengths),
            "document_images": _sorted_counts(totals.document_images),
            "rejected": {
                "documents": dict(sorted(totals.rejected_documents.items())),
                "images": dict(sorted(totals.rejected_images.items())),
            },
            "inputs": self.inputs,
            "sources": self._sources,
            "files": files,
        }

    def _publish(self) -> None:
        if self.path.exists():
            os.rename(self.path, self._replaced)
        os.rename(self._corpus, self.path)
        sync(self.path.parent)
        self.published = True

    def _tidy_up(self) -> None:
        # Errors are ignored: the corpus is there, and a worker that is given up but still runs may add files.
        shutil.rmtree(self._replaced, ignore_errors=True)
        # In one step, so that no half of this folder is ever taken for work to go on with.
        shutil.rmtree(self._done, ignore_errors=True)
        os.rename(self.staging, self._done)
        shutil.rmtree(self._done, ignore_errors=True)


def count_duplicates(hashes: np.ndarray) -> int:
    """Return how many of the images repeat an earlier one; (I,) uint64, may be memory-mapped. Takes 16 bytes each."""
    ordered = np.sort(hashes)
    return int(np.count_nonzero(ordered[1:] == ordered[:-1]))


def write_corpus(
    path: str | Path, documents: Iterable[EncodedDocument], tokenizer: Tokenizer, overwrite: bool = False
) -> Corpus:
    """Write a corpus from a stream of documents in this process, and return it opened.

    Args:
        path: Folder of the corpus.
        documents: The documents, already tokenized, in the order of the corpus.
        tokenizer: Tokenizer that made the tokens.
        overwrite: Replace a corpus that is already there.

    Raises:
        ConfigError: As ``CorpusWriter``, and if there is no document.
        ValueError: If a document does not fit the vocabulary.
    """
    with CorpusWriter(path, tokenizer, overwrite=overwrite) as writer:
        writer.discard()
        with PartWriter(writer.part_folder(0), tokenizer.vocab_size, {}) as part:
            for document in documents:
                part.add(document)
        writer.append(writer.part_folder(0))
        return writer.commit()


def _sorted_counts(counts: dict[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))
