"""Ranks that save distributed checkpoints, and a corpus to train on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from tests.data.corpora import WrittenCorpus, random_documents, write
from tests.distributed import run_distributed


@pytest.fixture(scope="session")
def run_saving() -> Iterator[Callable[..., list[Any]]]:
    """``run_distributed`` for functions that save.

    megatron-core's saver starts a process for its results, once per process that saves, and it takes three seconds to
    import torch. All forked ranks share one here, each with a queue of its own.
    """
    with multiprocessing.get_context("spawn").Manager() as manager:

        def run(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
            def with_queue(rank: int, world_size: int, *args: Any) -> Any:
                filesystem_async._results_queue = manager.Queue()
                return fn(rank, world_size, *args)

            return run_distributed(with_queue, world_size, *args)

        yield run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    """Documents of every sort, with images that can be decoded."""
    return write(tmp_path_factory.mktemp("corpus"), random_documents(60, seed=3, with_pixels=True))


@pytest.fixture(scope="session")
def corpus_path(corpus: WrittenCorpus) -> Path:
    return corpus.corpus.path
