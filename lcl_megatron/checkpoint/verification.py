"""Whether checkpoints and corpora on disk are still what was written: what ``tools/verify.py`` prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcl_megatron.checkpoint.folders import complete_checkpoints
from lcl_megatron.checkpoint.manifest import MANIFEST_FILE, DamagedCheckpointError, verify
from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.storage.corpus import FORMAT as CORPUS_FORMAT
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.indexed_file import CorpusError


@dataclass(frozen=True)
class Finding:
    """What became of one checkpoint or corpus."""

    path: Path
    """Its folder."""
    text: str
    """What it is, or what is damaged."""
    is_whole: bool
    """Whether every byte is as it was written."""


def verify_paths(paths: Sequence[Path]) -> list[Finding]:
    """Read all files of some checkpoints and corpora and compare them with their manifests.

    Args:
        paths: checkpoints, folders that hold some (all are verified), corpora.
    """
    return [finding for path in paths for finding in _verify(path)]


def _verify(path: Path) -> Iterator[Finding]:
    if _is_corpus(path):
        yield _corpus(path)
        return
    checkpoints = complete_checkpoints(path)
    if not checkpoints:
        yield Finding(
            path, f"{path} is neither a checkpoint, nor a folder that holds some, nor a corpus", is_whole=False
        )
    for checkpoint in checkpoints:
        try:
            manifest = verify(checkpoint)
        except DamagedCheckpointError as error:
            yield Finding(checkpoint, str(error), is_whole=False)
        else:
            size = sum(entry.size for entry in manifest.files.values()) / 1e9
            text = f"checkpoint of step {manifest.step}: whole, {len(manifest.files)} files, {size:.3f} GB"
            yield Finding(checkpoint, text, is_whole=True)


def _is_corpus(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return (path / "tokens.idx").exists()
    return isinstance(manifest, dict) and manifest.get("format") == CORPUS_FORMAT


def _corpus(path: Path) -> Finding:
    try:
        corpus = Corpus.open(path)
        corpus.verify()
    except (CorpusError, ConfigError, OSError) as error:
        return Finding(path, str(error), is_whole=False)
    return Finding(path, f"corpus of {corpus.num_documents} documents and {corpus.num_images} images: whole", True)
