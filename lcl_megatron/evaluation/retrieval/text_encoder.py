"""The fresh text encoder of retrieval: a causal transformer whose last token stands for the caption (LCL, A.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.config.errors import ConfigError


class TokenBatch(NamedTuple):
    """Tokenized texts."""

    ids: Tensor
    """(N, T) int64; behind a text's last token stands 0, which nothing reads."""
    lengths: Tensor
    """(N,) int64, tokens of each text, at least 1."""


class TextTokenizer(Protocol):
    """Texts to token ids that end with an end token."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ...

    @property
    def specials(self) -> tuple[list[int], int]:
        """Ids before the text, and the id that ends it."""
        ...


class ClipTokenizer:
    """CLIP's byte-pair encoding, which comes with open_clip."""

    def __init__(self) -> None:
        """Read the vocabulary; raises ``LibraryError`` without open_clip."""
        self._tokenizer: Any = stock_library("open_clip").SimpleTokenizer()

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return int(self._tokenizer.vocab_size)

    @property
    def specials(self) -> tuple[list[int], int]:
        """Start and end of text."""
        return [self._tokenizer.sot_token_id], self._tokenizer.eot_token_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, in lower case as CLIP has it."""
        return list(self._tokenizer.encode(text.lower()))


class FolderTokenizer:
    """A tokenizer folder of transformers."""

    def __init__(self, folder: Path) -> None:
        """Read the folder.

        Raises:
            ConfigError: there is none, it holds no tokenizer, or one without an end token.
        """
        if not folder.is_dir():
            raise ConfigError(f"there is no tokenizer folder {folder}; give one of transformers, or none for CLIP's")
        try:
            # Said, and not left out: transformers would ask on the terminal whether to run the code of the folder.
            tokenizers = stock_library("transformers").AutoTokenizer
            self._tokenizer: Any = tokenizers.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{folder} holds no tokenizer that transformers reads: {error}") from error
        if self._tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer in {folder} has no eos_token; the feature of a caption stands there")

    @property
    def vocab_size(self) -> int:
        """Number of ids, added ones included."""
        return len(self._tokenizer)

    @property
    def specials(self) -> tuple[list[int], int]:
        """The start token, if there is one, and the end token."""
        start = self._tokenizer.bos_token_id
        return [] if start is None else [start], self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def open_tokenizer(folder: Path | None) -> TextTokenizer:
    """Return the tokenizer of a folder, or CLIP's; raises ``ConfigError`` or ``LibraryError``."""
    return ClipTokenizer() if folder is None else FolderTokenizer(folder)


def tokenize(tokenizer: TextTokenizer, texts: Sequence[str], context_length: int) -> TokenBatch:
    """Return texts as ids; longer ones lose their end, but never the end token.

    Args:
        tokenizer: the tokenizer.
        texts: N texts.
        context_length: largest number of tokens T, special ones included; at least 3.
    """
    start, end = tokenizer.specials
    room = context_length - len(start) - 1
    rows = [[*start, *tokenizer.encode(text)[:room], end] for text in texts]
    lengths = np.array([len(row) for row in rows], np.int64)
    ids = np.zeros((len(rows), int(lengths.max())), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return TokenBatch(torch.from_numpy(ids), torch.from_numpy(lengths))


class TextEncoder(nn.Module):
    """A pre-norm causal transformer; the feature of a text is its last token's, normed and projected."""

    def __init__(self, vocab_size: int, context_length: int, width: int, layers: int, output_width: int) -> None:
        """Make an encoder of random weights; heads have 64 channels, or all there are."""
        super().__init__()
        heads = max(1, width // 64)
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.01 * torch.randn(context_length, width))
        nn.init.normal_(self.tokens.weight, std=0.02)
        # Not nn.TransformerEncoder: it copies one layer, so that all begin with the same weights.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, output_width)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Return (N, D) features of token ids (N, T) whose texts have ``lengths`` (N,) tokens."""
        hidden = self.tokens(ids) + self.positions[: ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device, dtype=hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        feature: Tensor = self.projection(self.norm(last))
        return feature
