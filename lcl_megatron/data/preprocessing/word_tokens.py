"""Token ids of texts, word by word from memory: the same ids as SentencePiece's, several times as fast.

In a byte-pair encoding whose pieces never reach over a space, what a word becomes does not depend on its neighbours: a
merge joins two pieces only into a piece of the vocabulary, and none holds a space (U+2581 inside the model) but at its
begin. Web text repeats few words often, so nearly all come from memory.
"""

from __future__ import annotations

from collections.abc import Sequence

from lcl_megatron.data.tokenizer import Tokenizer

SPACE = "\u2581"
"""SentencePiece's sign for a space."""
MAX_WORDS = 1 << 18
"""Words kept; then all are forgotten. about 60 MB."""
MAX_WORD_LENGTH = 32
"""Longer words, those of languages without spaces above all, are seldom met again and are not kept."""


class WordTokens:
    """Encodes texts as ``tokenizer.encode`` does.

    Args:
        tokenizer: Any tokenizer; one whose words depend on their neighbours is asked for every text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.by_word = words_are_independent(tokenizer)
        """Whether words are remembered."""
        self._known: dict[str, tuple[int, ...]] = {}
        # A space that no word follows. SentencePiece puts one before every text, hence the half of two.
        two = tuple(tokenizer.encode(" ")) if self.by_word else ()
        self._lone_space = two[: len(two) // 2]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, without special tokens.

        Raises:
            ValueError: If a text cannot be written as UTF-8 (a lone surrogate).
        """
        if not self.by_word:
            return self._tokenizer.encode_batch(texts)
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        # The sign itself, in a text, is taken for a space: too rare to be treated here.
        if not text or SPACE in text:
            return self._tokenizer.encode(text)
        known = self._known
        tokens: list[int] = []
        for word in text.split(" "):
            ids = known.get(word)
            tokens += self._learn(word) if ids is None else ids
        return tokens

    def _learn(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._tokenizer.encode(word)) if word else self._lone_space
        if len(word) <= MAX_WORD_LENGTH:
            if len(self._known) >= MAX_WORDS:
                self._known.clear()
            self._known[word] = ids
        return ids


def words_are_independent(tokenizer: Tokenizer) -> bool:
    """Return whether a text's token ids are those of its words, one behind the other, for every text.

    False where this cannot be told, because the package protobuf is missing.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        return False
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.model)
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    return (
        trainer.model_type == trainer.BPE
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        # Without bytes, neighbouring unknown characters become one token. Pieces of users are found before words are.
        and trainer.byte_fallback
        and not any(piece.type == piece.USER_DEFINED or SPACE in piece.piece[1:] for piece in model.pieces)
    )
