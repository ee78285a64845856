"""Text to train a tokenizer on, out of shards of any format and plain text files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document
from lcl_megatron.data.readers.formats import FORMATS


def training_texts(inputs: Sequence[Path], max_texts: int, format: str = "mmc4") -> Iterator[str]:
    """Yield the text segments of shards, and the lines of ``.txt`` files unless these are shards themselves.

    Args:
        inputs: Shards and text files.
        max_texts: At most so many texts, the first ones of each input in equal numbers.
        format: Format of the shards.

    Raises:
        ConfigError: If the format is unknown, or an input is neither of it nor ``.txt``.
    """
    if format not in FORMATS:
        raise ConfigError(f"format = {format!r} is unknown; known are {', '.join(sorted(FORMATS))}")
    each = -(-max_texts // len(inputs))
    suffixes = FORMATS[format].suffixes
    for path in inputs:
        if path.name.endswith(suffixes):
            documents = (item for item in FORMATS[format].read(path, path.name) if isinstance(item, Document))
            texts = (segment.text for document in documents for segment in document.segments)
            yield from itertools.islice(texts, each)
        elif path.suffix == ".txt":
            with open(path, encoding="utf-8", errors="replace") as stream:
                yield from itertools.islice((line.strip() for line in stream), each)
        else:
            raise ConfigError(f"{path} is neither of format {format} ({', '.join(suffixes)}) nor .txt")
