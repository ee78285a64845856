"""A corpus to train on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpora import WrittenCorpus, random_documents, write


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    """Documents of every sort, with images that can be decoded."""
    return write(tmp_path_factory.mktemp("corpus"), random_documents(60, seed=3, with_pixels=True))


@pytest.fixture(scope="session")
def corpus_path(corpus: WrittenCorpus) -> Path:
    return corpus.corpus.path
