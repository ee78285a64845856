"""Raw shards to a corpus: read, tokenize, probe images, write.

Workers take one shard each and write one part each; parts are appended in the order of the inputs. So the corpus is
the same, byte for byte, for any number of workers and after any number of interruptions.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from lcl_megatron.config.errors import ConfigError, require
from lcl_megatron.data.corpus import Corpus
from lcl_megatron.data.corpus_part import EncodedDocument, PartWriter, StoredImage, Totals
from lcl_megatron.data.corpus_writer import CorpusWriter
from lcl_megatron.data.document import Document, Reject
from lcl_megatron.data.image_folder import ImageFileError, probe_image
from lcl_megatron.data.image_store import ImageStore, open_image_store
from lcl_megatron.data.readers.formats import FORMATS
from lcl_megatron.data.readers.mmc4 import read_mmc4
from lcl_megatron.data.tokenizer import Tokenizer

MIN_JUDGED_IMAGES = 1000
"""The share of rejected images is judged only after so many images, and at the end."""
PARTS_AHEAD = 2
"""Finished shards that may wait for an earlier one, per worker; bounds the disk space used twice."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What is read, with which tokenizer, and where the corpus goes."""

    input: tuple[Path, ...]
    """Shards of the format. Their order is the order of the corpus."""
    format: str = "mmc4"
    """Format of the shards: see docs/data.md."""
    image_root: Path | None = None
    """Folder of image files, a tar, or a folder of tars; names that lead out of it are refused. None if the shards
    bring the images."""
    tokenizer_model: Path
    """SentencePiece model (tools/train_tokenizer.py)."""
    output: Path
    """Folder of the corpus to write."""
    num_workers: int = 1
    """Processes; each takes a shard at a time. The result does not depend on it."""
    overwrite: bool = False
    """Replace a corpus that is already at the output."""
    max_rejected_image_share: float = 0.5
    """Stop when more than this share of the images cannot be used; 1 = never. A wrong image_root ends up here."""
    max_image_pixels: int = 64_000_000
    """Images whose header announces more pixels are left out."""
    max_image_bytes: int = 64 << 20
    """Larger image files are left out."""

    def __post_init__(self) -> None:
        require(len(self.input) > 0, "no input: give --input SHARD [SHARD ...]")
        require(self.num_workers >= 1, f"num_workers = {self.num_workers}; at least 1 is needed")
        require(
            0 <= self.max_rejected_image_share <= 1,
            f"max_rejected_image_share = {self.max_rejected_image_share} is outside [0, 1]",
        )
        require(self.max_image_pixels >= 1 and self.max_image_bytes >= 1, "image limits must be at least 1")
        missing = [str(path) for path in self.input if not path.is_file()]
        require(not missing, f"{len(missing)} of {len(self.input)} inputs are no files: {', '.join(missing[:5])}")
        names = input_names(self.input)
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        require(not twice, f"inputs given more than once: {', '.join(twice[:5])}")
        brings_images = FORMATS[self.format].brings_images
        require(brings_images == (self.image_root is None), f"image_root = {self.image_root} with format {self.format}")
        if self.image_root is not None:
            is_tar = self.image_root.is_file() and self.image_root.name.endswith(".tar")
            require(
                self.image_root.is_dir() or is_tar,
                f"image_root = {self.image_root} is not a folder, and not a .tar file",
            )


@dataclass(frozen=True)
class PreprocessSummary:
    """What a run produced; prints as a few lines."""

    corpus: Corpus
    """The corpus, opened."""
    totals: Totals = field(repr=False)
    """All counts, with rejects by reason."""

    def __str__(self) -> str:
        """Return the counts, one per line."""
        totals = self.totals
        lines = [
            f"corpus {self.corpus.path} (fingerprint {self.corpus.fingerprint[:16]})",
            f"  documents  {totals.documents:,}",
            f"  images     {totals.images:,} ({totals.image_bytes:,} bytes)",
            f"  tokens     {totals.tokens:,} in {totals.segments:,} text segments",
        ]
        for what, counts in (("documents", totals.rejected_documents), ("images", totals.rejected_images)):
            lines.append(f"  rejected {what}: {counts.total():,}")
            lines.extend(f"    {number:,} {reason}" for reason, number in counts.most_common())
        return "\n".join(lines)


def preprocess(config: PreprocessConfig, report: Callable[[str], None] = lambda line: None) -> PreprocessSummary:
    """Write a corpus; what an interrupted run has finished is not done again.

    Args:
        config: What to do.
        report: Receives one line of progress per shard.

    Raises:
        ConfigError: If inputs, tokenizer or output do not fit, too many images are unusable, or nothing is left.
        OSError: If a shard or the disk cannot be read or written. The output is then as it was before.
    """
    tokenizer = Tokenizer.load(config.tokenizer_model)
    with CorpusWriter(config.output, tokenizer, _settings(config), config.overwrite) as writer:
        done = len(writer.inputs)
        if done:
            report(f"taking up an interrupted run: {done} of {len(config.input)} shards are done")
        for number, part in enumerate(_parts(config, writer, done), start=done + 1):
            part_totals = writer.append(part)
            totals = writer.totals
            report(
                f"[{number}/{len(config.input)}] {writer.inputs[-1]['name']}: {part_totals.documents:,} documents; "
                f"so far {totals.documents:,} documents, {totals.images:,} images, {totals.tokens:,} tokens, "
                f"{totals.rejected_images.total():,} images rejected"
            )
            _check_rejected(config, totals, last=number == len(config.input))
        _check_rejected(config, writer.totals, last=True)
        return PreprocessSummary(writer.commit(), writer.totals)


def write_part(config: PreprocessConfig, shard: Path, name: str, folder: Path) -> Path:
    """Read one shard and write its part; returns ``folder``. Runs in a worker process."""
    tokenizer = Tokenizer.load(config.tokenizer_model)
    images = None if config.image_root is None else open_image_store(config.image_root, config.max_image_bytes)
    source = {"name": name, "bytes": shard.stat().st_size}
    with PartWriter(folder, tokenizer.vocab_size, source) as part:
        for item in FORMATS[config.format].read(shard, name):
            if isinstance(item, Reject):
                part.reject(item)
            else:
                _store(item, tokenizer, images, config.max_image_pixels, part)
    return folder


def input_names(inputs: Sequence[Path]) -> list[str]:
    """Return what the inputs are called: their paths relative to the folder that all of them share."""
    paths = [os.path.abspath(path) for path in inputs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(os.path.relpath(path, common)).as_posix() for path in paths]


def training_texts(inputs: Sequence[Path], max_texts: int) -> Iterator[str]:
    """Yield text to train a tokenizer on: sentences of MMC4 shards, lines of ``.txt`` files.

    Args:
        inputs: MMC4 shards and text files.
        max_texts: At most so many texts, the first ones of each input in equal numbers.

    Raises:
        ConfigError: If an input is of neither kind.
    """
    each = -(-max_texts // len(inputs))
    for path in inputs:
        if path.suffix == ".txt":
            with open(path, encoding="utf-8", errors="replace") as stream:
                yield from itertools.islice((line.strip() for line in stream), each)
        elif re.search(r"\.jsonl(\.zip)?$", path.name):
            documents = (item for item in read_mmc4(path) if isinstance(item, Document))
            texts = (segment.text for document in documents for segment in document.segments)
            yield from itertools.islice(texts, each)
        else:
            raise ConfigError(f"{path} is neither .jsonl, .jsonl.zip nor .txt")


def _store(
    document: Document, tokenizer: Tokenizer, images: ImageStore | None, max_pixels: int, part: PartWriter
) -> None:
    """Tokenize a document, read its images, and write what is usable."""
    stored = []
    for image in document.images:
        try:
            data = image.data if images is None else images.read(image.name)
            if data is None:
                raise ImageFileError("missing file", "the record brings no image")
            width, height = probe_image(data, max_pixels)
        except ImageFileError as error:
            part.reject(Reject(document.source, error.reason, error.detail, image.number, image.name))
        else:
            stored.append(StoredImage(image, data, width, height))
    if stored:
        segments = [tokenizer.encode(segment.text) for segment in document.segments]
        part.add(EncodedDocument(segments, stored, document.source))
    else:
        part.reject(Reject(document.source, "no images", f"none of its {len(document.images)} images is usable"))


def _parts(config: PreprocessConfig, writer: CorpusWriter, done: int) -> Iterator[Path]:
    """Yield the finished parts in the order of the inputs, from input ``done`` on."""
    tasks = []
    for number, (shard, name) in enumerate(zip(config.input, input_names(config.input), strict=True)):
        if number >= done:
            tasks.append(partial(write_part, config, shard, name, writer.part_folder(number)))
    if config.num_workers == 1:
        for task in tasks:
            yield _finished(task) or task()
        return
    # Spawned, not forked: a forked child would share this process's locks. The executor, unlike a multiprocessing
    # pool, reports a worker that was killed instead of waiting for it.
    with ProcessPoolExecutor(config.num_workers, mp_context=get_context("spawn")) as pool:
        pending: deque[Future[Path] | Path] = deque()
        try:
            for task in tasks:
                pending.append(_finished(task) or pool.submit(task))
                if len(pending) > config.num_workers * PARTS_AHEAD:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(task: partial[Path]) -> Path | None:
    """Return the part of a task if an earlier run has finished it."""
    folder: Path = task.args[-1]
    return folder if folder.exists() else None


def _result(part: Future[Path] | Path) -> Path:
    return part if isinstance(part, Path) else part.result()


def _settings(config: PreprocessConfig) -> str:
    """Return everything that decides the parts, so that no part of another run is taken for one of this."""
    stats = [path.stat() for path in config.input]
    return json.dumps(
        {
            "inputs": [
                [name, stat.st_size, stat.st_mtime_ns]
                for name, stat in zip(input_names(config.input), stats, strict=True)
            ],
            "format": config.format,
            "image_root": config.image_root and os.path.abspath(config.image_root),
            "limits": [config.max_image_pixels, config.max_image_bytes],
        }
    )


def _check_rejected(config: PreprocessConfig, totals: Totals, last: bool) -> None:
    rejected = totals.rejected_images.total()
    seen = rejected + totals.images
    if rejected > config.max_rejected_image_share * seen and (last or seen >= MIN_JUDGED_IMAGES):
        raise ConfigError(
            f"{rejected:,} of {seen:,} images cannot be used ({rejected / seen:.0%}; the limit is "
            f"{config.max_rejected_image_share:.0%}): {dict(totals.rejected_images.most_common())}; is image_root = "
            f"{config.image_root} right? --max-rejected-image-share 1 goes on regardless"
        )
