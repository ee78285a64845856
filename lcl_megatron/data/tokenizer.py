"""The tokenizer: SentencePiece with six special tokens that no text can produce.

The special tokens are *control symbols* of the model. SentencePiece never emits a control symbol from text, whatever
the text says, so a web page that contains ``<image>`` cannot break the count of image slots.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import sentencepiece

from lcl_megatron.config.errors import ConfigError

PIECES: dict[str, str] = {
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    "boi": "<BoI>",
    "eoi": "<EoI>",
    "image": "<image>",
}
"""Piece of each special token inside the SentencePiece model."""
SPACE = "\u2581"
"""SentencePiece's sign for a space."""
MAX_SENTENCE_BYTES = 1 << 16
"""Longer texts are cut for tokenizer training, because the trainer would leave them out."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens. All differ, and none is ever produced from text."""

    bos: int
    """Begin of a document."""
    eos: int
    """End of a document."""
    pad: int
    """Fills a row's end."""
    boi: int
    """Begin of an image; its LM output is the context feature."""
    eoi: int
    """End of an image."""
    image: int
    """Stands at every position that an image latent replaces."""


class Tokenizer:
    """Text to token ids and back. Picklable; make one with ``load``.

    Args:
        model: Bytes of a SentencePiece model that holds the special tokens of ``PIECES`` as control symbols.
        name: Names the model in errors.

    Raises:
        ConfigError: If the bytes are no SentencePiece model, or a special token is missing or can come from text.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        self.model = model
        """Bytes of the SentencePiece model."""
        self._name = name
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        # The latter where SentencePiece's complaint quotes a piece that is no text.
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{name} is not a SentencePiece model ({len(model)} bytes); make one with tools/train_tokenizer.py"
            ) from error
        self.special_tokens = self._find_special_tokens()
        """Ids of the special tokens."""
        self.fingerprint = hashlib.sha256(model).hexdigest()
        """SHA-256 of the model's bytes, hex."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a model file.

        Raises:
            ConfigError: If there is no such file, or it is not a fitting model.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"cannot read the tokenizer {path}: {error.strerror}; make one with tools/train_tokenizer.py"
            ) from error
        return cls(model, str(path))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, str]]:
        """Pickle the model's bytes; the processor is built again."""
        return Tokenizer, (self.model, self._name)

    @property
    def vocab_size(self) -> int:
        """Number of token ids; every id of text or special token is below it."""
        return int(self._processor.vocab_size())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens. An empty text has none.

        Raises:
            ValueError: If the text cannot be written as UTF-8 (a lone surrogate).
        """
        return list(self._processor.encode(text.encode("utf-8"), out_type=int))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of many texts, each as ``encode`` gives them; faster than one call for each.

        Raises:
            ValueError: If a text cannot be written as UTF-8 (a lone surrogate).
        """
        encoded = self._processor.encode([text.encode("utf-8") for text in texts], out_type=int, num_threads=1)
        return [list(tokens) for tokens in encoded]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        return str(self._processor.decode([int(token) for token in tokens]))

    def surfaces(self, tokens: Iterable[int]) -> list[str]:
        """Return what each token stands for in the text: joined, the text, with a space before its first word.

        A character of several byte tokens stands at its last byte; special tokens have no text.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        texts: list[str] = []
        for token in map(int, tokens):
            if self._processor.is_byte(token):
                texts.append(decoder.decode(bytes([int(self._processor.id_to_piece(token)[3:5], 16)])))
                continue
            if broken := decoder.decode(b"", final=True):
                texts[-1] += broken
            is_control = self._processor.is_control(token)
            texts.append("" if is_control else self._processor.id_to_piece(token).replace(SPACE, " "))
        if broken := decoder.decode(b"", final=True):
            texts[-1] += broken
        return texts

    def _find_special_tokens(self) -> SpecialTokens:
        ids: dict[str, int] = {}
        for field in fields(SpecialTokens):
            piece = PIECES[field.name]
            token = self._processor.piece_to_id(piece)
            if self._processor.id_to_piece(token) != piece:
                raise ConfigError(
                    f"{self._name} has no special token {piece}; it needs {' '.join(PIECES.values())}: "
                    "make a tokenizer with tools/train_tokenizer.py"
                )
            if not self._processor.is_control(token):
                raise ConfigError(
                    f"{self._name}: {piece} is not a control symbol, so text that contains the string "
                    f"would become a special token; make a tokenizer with tools/train_tokenizer.py"
                )
            ids[field.name] = token
        return SpecialTokens(**ids)


def train_tokenizer(texts: Iterable[str], output: str | Path, vocab_size: int) -> Tokenizer:
    """Train a byte-pair encoding with byte fall-back on texts and write it; the same texts give the same bytes.

    Every text can be encoded and comes back as it was (but for U+2581, SentencePiece's own sign for a space):
    no Unicode normalisation, rare characters as bytes. A text that is too small for ``vocab_size`` gives a
    smaller vocabulary: look at ``vocab_size`` of the result.

    Args:
        texts: Text segments. SentencePiece holds all of them in memory.
        output: Model file to write.
        vocab_size: Number of token ids, special tokens and the 256 bytes included.

    Raises:
        ConfigError: If there is no text, or ``vocab_size`` does not leave room for bytes and characters.
    """
    sentences = (piece for text in texts for piece in _cut(text))
    first = next(sentences, None)
    if first is None:
        raise ConfigError("there is no text to train a tokenizer on: all texts are empty")
    writer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            bos_piece=PIECES["bos"],
            eos_piece=PIECES["eos"],
            pad_piece=PIECES["pad"],
            control_symbols=[PIECES["boi"], PIECES["eoi"], PIECES["image"]],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(
            f"SentencePiece cannot train a vocabulary of {vocab_size} on this text: {error}; special "
            "tokens, 256 bytes and the characters of the text must fit: choose a larger size"
        ) from error
    tokenizer = Tokenizer(writer.getvalue(), str(output))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_bytes(tokenizer.model)
    return tokenizer


def _cut(text: str) -> Iterator[str]:
    """Yield a text in pieces that the trainer accepts; a character has at most 4 bytes."""
    step = MAX_SENTENCE_BYTES // 4
    for begin in range(0, len(text), step):
        yield text[begin : begin + step]
