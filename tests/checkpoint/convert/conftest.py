"""The stock libraries, where they are installed, and a tokenizer."""

from __future__ import annotations

import os
from types import ModuleType

import pytest

# Before huggingface_hub is imported: nothing here may ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library
from lcl_megatron.data.tokenizer import Tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """transformers, importable together with timm."""
    try:
        stock_library("timm")
        module = stock_library("transformers")
    except LibraryError as error:
        pytest.skip(str(error))
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-pair encoding of a few hundred pieces, some of them runs of one character."""
    texts = ["the cat sat on the mat, the dog on the log"] * 4 + ["=" * n + " " * n + "a" * n for n in range(1, 30)]
    return train_tokenizer(
        [*texts, "caf\u00e9 na\u00efve \u6771\u4eac\u306e\u732b"], tmp_path_factory.mktemp("t") / "tokenizer.model", 330
    )
