"""Train a SentencePiece tokenizer with this project's special tokens (docs/data.md).

python tools/train_tokenizer.py --input data/docs_shard_*_v2.jsonl.zip --output tokenizer.model --vocab-size 50304
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.preprocessing.tokenizer_texts import training_texts
from lcl_megatron.data.tokenizer import train_tokenizer


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What the tokenizer is trained on."""

    input: tuple[Path, ...]
    """Shards of the format, or text files (.txt)."""
    format: str = "mmc4"
    """Format of the shards: see docs/data.md."""
    output: Path
    """Model file to write."""
    vocab_size: int = 50304
    """Number of token ids, special tokens and 256 bytes included."""
    max_texts: int = 2_000_000
    """Texts (sentences or lines) to train on, the first ones of each input in equal numbers."""


def main() -> None:
    """Read the flags, train, write the model, say what it is."""
    try:
        config = tyro.cli(TokenizerConfig, description=__doc__)
        texts = training_texts(config.input, config.max_texts, config.format)
        tokenizer = train_tokenizer(texts, config.output, config.vocab_size)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{config.output}: {tokenizer.vocab_size} token ids, fingerprint {tokenizer.fingerprint[:16]}")
    if tokenizer.vocab_size < config.vocab_size:
        print(
            f"note: the text is too small for {config.vocab_size} token ids; it gave {tokenizer.vocab_size}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
