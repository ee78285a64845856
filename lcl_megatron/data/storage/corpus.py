"""A preprocessed corpus on disk, opened for reading.

A corpus is a folder that ``corpus_writer`` wrote in one piece and that never changes afterwards::

    manifest.json           format, tokenizer, sources, counts, sizes and SHA-256 of every file, and of itself
    tokenizer.model         the tokenizer that made the tokens
    tokens.bin/.idx         one sequence per text segment, one document per document (uint16 or int32)
    images.bin/.idx         one sequence per image: its encoded bytes (uint8)
    names.bin/.idx          one sequence per image: its name (UTF-8, uint8)
    image_*.npy             side arrays, one entry per image
    document_source.npy     source file and line of every document
    rejects.jsonl           what was left out, and why

It knows nothing of patch size, sequence length, placement or image choice, so one corpus serves every model.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.storage.indexed_file import CorpusError, IndexedFile
from lcl_megatron.data.tokenizer import SpecialTokens, Tokenizer

FORMAT = "lcl_megatron corpus"
FORMAT_VERSION = 2
IMAGE_ARRAYS: dict[str, str] = {
    "image_segment": "int32",
    "image_similarity": "float32",
    "image_width": "int32",
    "image_height": "int32",
    "image_kind": "uint8",
    "image_number": "int32",
    "image_hash": "uint64",
}
"""Side arrays with one entry per image, and their dtypes."""
CONTENT_FILES: tuple[str, ...] = (
    *(f"{name}.{suffix}" for name in ("tokens", "images", "names") for suffix in ("bin", "idx")),
    *(f"{name}.npy" for name in (*IMAGE_ARRAYS, "document_source")),
    "tokenizer.model",
)
"""The files that make up the content; ``Corpus.fingerprint`` is the hash of their hashes."""
MANIFEST_KEYS = frozenset(
    "format format_version fingerprint tokenizer image_processing counts document_lengths document_images rejected "
    "inputs sources files sha256".split()
)
"""All fields of a manifest. ``sha256`` came last: corpora of earlier releases lack it, and are read without it."""


class Corpus:
    """Read access to a corpus; cheap to open, and picklable (another process opens it again by path).

    D documents, G text segments, I images. All arrays are memory-mapped and read-only.

    Attributes:
        path: Folder of the corpus.
        manifest: Content of ``manifest.json``.
        tokenizer: Tokenizer that made the tokens.
        vocab_size: Number of token ids of that tokenizer.
        special_tokens: Its special tokens.
        fingerprint: Hash (hex) that names the content.
        num_documents: D.
        num_segments: G.
        num_images: I.
        document_segments: (D + 1,) int64, first text segment of each document.
        segment_lengths: (G,) int32, tokens in each text segment; 0 for an empty text.
        document_images: (D + 1,) int64, first image of each document.
        document_sources: (D, 2) int64, source (numbered as in the manifest) and line of each document.
        image_lengths: (I,) int32, bytes of each encoded image.
        image_segment: (I,) int32, index of its text segment within its document; ascending within a document.
        image_similarity: (I,) float32, CLIP similarity to that segment.
        image_width: (I,) int32, pixels of the stored image; 0 if unknown.
        image_height: (I,) int32, pixels of the stored image; 0 if unknown.
        image_kind: (I,) uint8, an ``ImageKind``.
        image_hash: (I,) uint64, first 8 bytes of the SHA-256 of the source file: equal where the files are.
    """

    def __init__(self, path: Path, tokenizer_model: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.fingerprint: str = self.manifest["fingerprint"]
        self._tokenizer_model = tokenizer_model
        self.tokenizer = Tokenizer.load(tokenizer_model)
        self._check_tokenizer()
        self.vocab_size: int = self.tokenizer.vocab_size
        self.special_tokens: SpecialTokens = self.tokenizer.special_tokens
        self._tokens = IndexedFile(path / "tokens")
        self._images = IndexedFile(path / "images")
        self._names = IndexedFile(path / "names")
        counts = self.manifest["counts"]
        self.num_documents: int = counts["documents"]
        self.num_segments: int = counts["segments"]
        self.num_images: int = counts["images"]
        self.document_segments = self._tokens.document_indices
        self.segment_lengths = self._tokens.lengths
        self.document_images = self._images.document_indices
        self.image_lengths = self._images.lengths
        self._check_counts()
        self.image_segment = self._load_array("image_segment")
        self.image_similarity = self._load_array("image_similarity")
        self.image_width = self._load_array("image_width")
        self.image_height = self._load_array("image_height")
        self.image_kind = self._load_array("image_kind")
        self.image_hash = self._load_array("image_hash")
        self._image_number = self._load_array("image_number")
        self.document_sources = load_array(path / "document_source.npy", "int64", (self.num_documents, 2))
        self._mapped = (
            self.document_segments,
            self.segment_lengths,
            self._tokens.pointers,
            self.document_images,
            self.document_sources,
            self.image_lengths,
            *(getattr(self, name) for name in IMAGE_ARRAYS if name != "image_number"),
        )

    @classmethod
    def open(cls, path: str | Path, tokenizer_model: str | Path = "") -> Corpus:
        """Open a corpus and check that it is complete and fits the tokenizer.

        Sizes, counts and the recorded range of token ids are checked; the bytes are not read. ``verify`` reads them.

        Args:
            path: Folder of the corpus.
            tokenizer_model: SentencePiece model to use; empty = the copy inside the corpus.

        Raises:
            CorpusError: If the corpus is incomplete, damaged or of another format.
            ConfigError: If there is no corpus at ``path``, or the tokenizer is not the one that made it: token
                ids would then mean other text, which no later check can see.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise ConfigError(
                f"no corpus at {path}: it has no manifest.json; write one with tools/preprocess_data.py --output {path}"
            )
        return cls(path, Path(tokenizer_model) if str(tokenizer_model) else path / "tokenizer.model")

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to open the same corpus."""
        return {"path": self.path, "tokenizer_model": self._tokenizer_model, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the corpus again; a corpus that was replaced meanwhile is refused."""
        Corpus.__init__(self, state["path"], state["tokenizer_model"])
        if self.fingerprint != state["fingerprint"]:
            raise CorpusError(
                f"the corpus at {self.path} was replaced while in use: its fingerprint is {self.fingerprint[:16]}, "
                f"expected {state['fingerprint'][:16]}; start again"
            )

    def text_tokens_before(self, segments: np.ndarray) -> np.ndarray:
        """Return the text tokens of the whole corpus that stand before some segments (G = the end), int64.

        Differences of the result are lengths of ranges of segments; unlike a sum over ``segment_lengths`` it reads
        one number per segment asked for.
        """
        total = int(self.manifest["counts"]["tokens"])
        if not self.num_segments:
            return np.zeros(segments.shape, dtype=np.int64)
        itemsize = self._tokens.dtype.itemsize
        # A view without numpy's memmap class, whose every access costs a few microseconds.
        # Never ``np.take``: behind an index's header of 33 bytes nothing is aligned, and it would copy the whole array.
        before = np.asarray(self._tokens.pointers)[np.minimum(segments, self.num_segments - 1)] // itemsize
        return np.where(segments < self.num_segments, before, total)

    def image_documents(self, images: np.ndarray) -> np.ndarray:
        """Return the document of each image, int64 of the same shape, by bisection.

        ``np.searchsorted`` would copy all borders first: behind the index's header of 33 bytes nothing is aligned.
        """
        borders = np.asarray(self.document_images)
        low = np.zeros(images.shape, dtype=np.int64)
        high = np.full(images.shape, self.num_documents, dtype=np.int64)
        for _ in range(self.num_documents.bit_length()):
            middle = (low + high) // 2
            is_above = borders[middle] <= images
            low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
        return low

    def segment_tokens(self, segment: int) -> np.ndarray:
        """Return the token ids of a text segment (numbered over the whole corpus), (length,) int32.

        Raises:
            IndexError: If there is no such segment.
            CorpusError: If an id is outside the vocabulary (an embedding would read another row without a word).
        """
        tokens = self._tokens.read(segment).astype(np.int32)
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < self.vocab_size):
            document = int(np.searchsorted(self.document_segments, segment, side="right")) - 1
            raise CorpusError(
                f"{self.document_source(document)}: segment {segment} of {self.path} has token ids from {tokens.min()} "
                f"to {tokens.max()}, the vocabulary has {self.vocab_size}: tokens.bin is damaged; preprocess it again"
            )
        return tokens

    def image_bytes(self, image: int) -> bytes:
        """Return the encoded bytes of an image; not yet decoded, may be truncated.

        Raises:
            IndexError: If there is no such image.
            CorpusError: If ``images.bin`` was cut short while in use.
        """
        return self._images.read_bytes(image)

    def image_source(self, image: int) -> str:
        """Return where an image comes from: ``docs_shard_7.jsonl:1312 image 3 (a1b2.jpg)``."""
        document = int(self.image_documents(np.array(image)))
        name = self._names.read_bytes(image).decode("utf-8")
        return f"{self.document_source(document)} image {self._image_number[image]} ({name})"

    def document_source(self, document: int) -> str:
        """Return where a document comes from: ``docs_shard_7.jsonl:1312``."""
        source, line = (int(value) for value in self.document_sources[document])
        return f"{self.manifest['sources'][source]['name']}:{line}"

    def release_pages(self) -> None:
        """Give back the memory of side arrays that were read; they are read again from the file system's cache.

        A pass over all documents of a large corpus would else count as tens of gigabytes of this process.
        """
        for array in self._mapped:
            pages = getattr(array, "_mmap", None)
            if pages is not None:
                pages.madvise(mmap.MADV_DONTNEED)

    def verify(self) -> None:
        """Read every byte and compare it with the manifest's SHA-256; takes as long as the disk does.

        Raises:
            CorpusError: Names every file that differs.
        """
        damaged = []
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            if not file.is_file() or file.stat().st_size != entry["bytes"] or file_sha256(file) != entry["sha256"]:
                damaged.append(name)
        if damaged:
            raise CorpusError(f"{self.path}: {', '.join(damaged)} differ from the manifest; preprocess the data again")

    def _load_array(self, name: str) -> np.ndarray:
        return load_array(self.path / f"{name}.npy", IMAGE_ARRAYS[name], (self.num_images,))

    def _check_tokenizer(self) -> None:
        recorded = self.manifest["tokenizer"]
        if self.tokenizer.fingerprint != recorded["fingerprint"]:
            raise ConfigError(
                f"the tokenizer {self._tokenizer_model} (fingerprint {self.tokenizer.fingerprint}) is not the one that "
                f"made the corpus {self.path} (fingerprint {recorded['fingerprint']}); "
                "leave data.tokenizer_model empty to use the corpus's own copy, or preprocess the data again"
            )
        low, high = recorded["token_range"]
        if recorded["vocab_size"] != self.tokenizer.vocab_size or low < 0 or high >= self.tokenizer.vocab_size:
            raise CorpusError(
                f"{self.path}: token ids from {low} to {high} of a vocabulary of {recorded['vocab_size']}; "
                f"the tokenizer has {self.tokenizer.vocab_size}: the manifest is damaged; preprocess the data again"
            )

    def _check_counts(self) -> None:
        found = {
            "documents": len(self.document_segments) - 1,
            "documents (images)": len(self.document_images) - 1,
            "segments": len(self.segment_lengths),
            "images": len(self._images.lengths),
            "images (names)": len(self._names.lengths),
        }
        for name, number in found.items():
            expected = self.manifest["counts"][name.split(" ")[0]]
            if number != expected:
                raise CorpusError(f"{self.path} holds {number} {name}; its manifest says {expected}: it is damaged")


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the corpus at ``path`` after checking format and sizes of all files.

    Raises:
        CorpusError: If it is no manifest of this format, or a file is missing or has another size.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        format_name, version = manifest["format"], manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path}/manifest.json cannot be read ({error!r}); preprocess the data again") from error
    if format_name != FORMAT or version != FORMAT_VERSION:
        raise CorpusError(
            f"{path}: format {format_name!r} version {version!r}; this version reads {FORMAT!r} version "
            f"{FORMAT_VERSION}: preprocess the data again"
        )
    missing = {"fingerprint", "tokenizer", "counts", "sources", "files"} - manifest.keys()
    # A field that nobody knows may be one whose name was damaged, such as that of the hash.
    if (
        missing
        or not manifest.keys() <= MANIFEST_KEYS
        or fingerprint(manifest["files"]) != manifest["fingerprint"]
        or manifest.get("sha256", manifest_hash(manifest)) != manifest_hash(manifest)
    ):
        raise CorpusError(f"{path / 'manifest.json'} contradicts itself: it was changed after it was written")
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"holds {size} bytes"
            raise CorpusError(f"{file} {found}; the manifest announces {entry['bytes']} bytes: the corpus is damaged")
    return manifest


def load_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a side array as a read-only memory map.

    Raises:
        CorpusError: If it is no array, or holds Python objects, which are never unpickled, or if dtype or shape are
            not those announced.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
    # A damaged header raises nearly anything, down to the errors of Python's tokenizer.
    except Exception as error:
        # numpy's own words may advise to unpickle it.
        is_objects = "pickle" in str(error) or "Python objects" in str(error)
        what = "holds Python objects, which are not loaded" if is_objects else f"is no array ({error})"
        raise CorpusError(f"{path} {what}; expected {dtype} {shape}: it is damaged") from error
    # np.load returns a dictionary of arrays for a zip file.
    if not isinstance(array, np.ndarray):
        raise CorpusError(f"{path} is an archive; expected one array, {dtype} {shape}: it is damaged")
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise CorpusError(f"{path} holds {array.dtype} {array.shape}; expected {dtype} {shape}: it is damaged")
    return array


def fingerprint(files: dict[str, dict[str, Any]]) -> str:
    """Return the hash that names a corpus's content, from the ``files`` section of its manifest."""
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(CONTENT_FILES) if name in files)
    return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content without the hash itself, as hex."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
