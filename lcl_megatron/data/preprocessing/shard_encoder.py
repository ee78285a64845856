"""One shard to one part: read, judge and store images, tokenize. What every worker of every engine runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, Reject
from lcl_megatron.data.image_stores.image_folder import ImageFileError
from lcl_megatron.data.image_stores.image_store import ImageStore, open_image_store
from lcl_megatron.data.preprocessing.image_processing import ImageRules
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from lcl_megatron.data.preprocessing.progress import ShardReport, report_path
from lcl_megatron.data.preprocessing.word_tokens import WordTokens
from lcl_megatron.data.readers.formats import FORMATS
from lcl_megatron.data.storage.corpus_part import EncodedDocument, PartWriter, StoredImage
from lcl_megatron.data.tokenizer import Tokenizer

BATCH_TEXTS = 1024
"""Texts that are tokenized in one call, at least, unless the shard ends."""
BATCH_IMAGE_BYTES = 64 << 20
"""Bytes of images that may wait for it: bounds the memory of a worker."""


@dataclass(frozen=True)
class ShardTask:
    """One shard and where its part goes; picklable, and small."""

    config: PreprocessConfig
    """The run, with this shard as its only input."""
    name: str
    """What the shard is called in messages and in the corpus."""
    tokenizer_fingerprint: str
    """Fingerprint of the run's tokenizer."""
    part: Path
    """The part to write."""


def write_part(task: ShardTask) -> Path:
    """Read one shard and write its part, unless it is there already; returns the part.

    Raises:
        ConfigError: If the tokenizer has changed since the run began.
        OSError: If the shard or the disk cannot be read or written.
    """
    if task.part.exists():
        return task.part
    config, shard = task.config, task.config.input[0]
    tokenizer, tokens = load_tokenizer(config.tokenizer_model, task.tokenizer_fingerprint)
    store = open_image_store(config.image_root, config.max_image_bytes) if config.image_root is not None else None
    report = ShardReport(report_path(task.part), shard)
    source = {"name": task.name, "bytes": shard.stat().st_size}
    with PartWriter(task.part, tokenizer.vocab_size, source) as part:
        encoder = DocumentEncoder(tokens, store, config.image_rules, part)
        for item in FORMATS[config.format].read(shard, task.name):
            if isinstance(item, Reject):
                part.reject(item)
            else:
                encoder.add(item)
            report.tick(part.totals)
        encoder.flush()
    return task.part


@dataclass
class DocumentEncoder:
    """Turns documents into encoded ones, and tokenizes many at a time."""

    tokens: WordTokens
    """Makes the tokens."""
    store: ImageStore | None
    """Where images lie that records only name; None if all bring their bytes."""
    rules: ImageRules
    """How images are judged and stored."""
    part: PartWriter
    """Where documents and rejects go."""
    _waiting: list[tuple[Document, list[StoredImage]]] = field(default_factory=list)
    _texts: int = 0
    _image_bytes: int = 0

    def add(self, document: Document) -> None:
        """Take a document; it is written when enough of them wait to be tokenized together."""
        stored = []
        for image in document.images:
            try:
                stored.append(self.rules.store(image, self._read(image.name) if image.data is None else image.data))
            except ImageFileError as error:
                self.part.reject(Reject(document.source, error.reason, error.detail, image.number, image.name))
        if not stored:
            detail = f"none of its {len(document.images)} images is usable"
            self.part.reject(Reject(document.source, "no images", detail))
            return
        self._waiting.append((document, stored))
        self._texts += len(document.segments)
        self._image_bytes += sum(len(image.data) for image in stored)
        if self._texts >= BATCH_TEXTS or self._image_bytes >= BATCH_IMAGE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Tokenize and write all documents that wait."""
        texts = [segment.text for document, _ in self._waiting for segment in document.segments]
        encoded = iter(self.tokens.encode_batch(texts))
        for document, stored in self._waiting:
            segments = [next(encoded) for _ in document.segments]
            self.part.add(EncodedDocument(segments, stored, document.source))
        self._waiting.clear()
        self._texts = self._image_bytes = 0

    def _read(self, name: str) -> bytes:
        if self.store is None:
            raise ImageFileError("missing file", "the record brings no image, and there is no image_root")
        return self.store.read(name)


@lru_cache(maxsize=1)
def load_tokenizer(model: Path, fingerprint: str) -> tuple[Tokenizer, WordTokens]:
    """Return the tokenizer, loaded once for each process, and the words that it has met there.

    Raises:
        ConfigError: If it is not the one with that fingerprint: parts of two tokenizers must not meet in a corpus.
    """
    tokenizer = Tokenizer.load(model)
    if tokenizer.fingerprint != fingerprint:
        raise ConfigError(
            f"{model} has changed while it was in use: fingerprint {tokenizer.fingerprint[:16]}, expected "
            f"{fingerprint[:16]}; run the same command again"
        )
    return tokenizer, WordTokens(tokenizer)
