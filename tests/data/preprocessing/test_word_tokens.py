"""Token ids word by word. Oracle: SentencePiece on the whole text."""

from __future__ import annotations

import io

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.data.preprocessing import word_tokens
from lcl_megatron.data.preprocessing.word_tokens import WordTokens, words_are_independent
from lcl_megatron.data.tokenizer import PIECES, Tokenizer, train_tokenizer
from tests.data.conftest import SENTENCES

TEXTS = [
    *SENTENCES,
    "caf\u00e9 \u6f22\u5b57 caf\u00e9 <image> 12 345",
    "tabs\tand\nlines",
    "the  river   has    spaces",
]
CHARACTERS = "aecht .,\t\n\u3000\u00e9\u6f22\U0001f600\u2581\u00ad\x00<s>"


def train(**options: object) -> Tokenizer:
    """A tokenizer of our special tokens that differs from ``train_tokenizer`` in some options."""
    model = io.BytesIO()
    given_options: dict[str, object] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "pad_id": 3,
        "pad_piece": PIECES["pad"],
        "control_symbols": [PIECES["boi"], PIECES["eoi"], PIECES["image"]],
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=model, **given_options | options
    )
    return Tokenizer(model.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS * 3, tmp_path_factory.mktemp("words") / "tokenizer.model", 420)


@given(st.lists(st.text(CHARACTERS) | st.sampled_from(["the river", " the", "A cat  sees", "\u2581the"]), max_size=6))
def test_any_text_has_the_ids_of_sentencepiece(trained: Tokenizer, texts: list[str]):
    words = WordTokens(trained)
    assert words.by_word
    joined = ["".join(texts), " ".join(texts), "", " ", "  "]
    for _ in range(2):
        assert words.encode_batch(joined) == [trained.encode(text) for text in joined]


def test_words_are_forgotten_before_memory_runs_out(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(word_tokens, "MAX_WORDS", 3)
    words = WordTokens(trained)
    for text in [*TEXTS, "x" * 100]:
        assert words.encode_batch([text]) == [trained.encode(text)]
        assert len(words._known) <= 3
        assert "x" * 100 not in words._known


@pytest.mark.parametrize(
    "options",
    [
        {"split_by_whitespace": False, "vocab_size": 800},
        {"model_type": "unigram"},
        {"treat_whitespace_as_suffix": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"user_defined_symbols": ["the river"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_tokenizers_are_asked_for_every_text(options: dict[str, object]):
    tokenizer = train(**options)
    assert not words_are_independent(tokenizer)
    words = WordTokens(tokenizer)
    assert words.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_without_protobuf_nothing_is_assumed(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece.sentencepiece_model_pb2", None)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    assert not words_are_independent(trained)
    assert WordTokens(trained).encode_batch(TEXTS) == [trained.encode(text) for text in TEXTS]


def test_a_lone_surrogate_is_an_error_as_everywhere(trained: Tokenizer):
    with pytest.raises(UnicodeEncodeError):
        WordTokens(trained).encode_batch(["a \ud800 b"])
