"""The tokenizer in transformers. Oracle: SentencePiece itself, through the package's tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece

from lcl_megatron.checkpoint.convert.tokenizer_json import tokenizer_files
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.data.tokenizer import PIECES, Tokenizer

TEXTS = [
    "",
    " ",
    "the cat sat on the mat.",
    " two  spaces   three\tand\n\nnew lines \r\n",
    "caf\u00e9 cafe\u0301 na\u00efve stra\u00dfe \u00a0\u3000\ufeff",
    "\u6771\u4eac\u306e\u732b \U0001f408 \U0001f469\u200d\U0001f680",
    "a\u2581b \u2581\u2581",
    "<image> <s>x</s> <BoI><image><EoI> <pad> <unk> <0x41>",
    "=" * 57 + "a" * 31 + " " * 23,
    "12345 67.89",
]


def write(folder: Path, tokenizer: Tokenizer, specials_in_text: bool) -> Path:
    for name, text in tokenizer_files(tokenizer.model, 64, specials_in_text).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stock(transformers: ModuleType, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return transformers.AutoTokenizer.from_pretrained(write(tmp_path_factory.mktemp("plain"), tokenizer, False))


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_texts_have_the_same_ids_and_come_back(text: str, stock: Any, tokenizer: Tokenizer) -> None:
    expected = tokenizer.encode(text)
    assert stock(text, add_special_tokens=False).input_ids == expected
    assert stock(text).input_ids == [tokenizer.special_tokens.bos, *expected]
    assert stock.decode(expected) == tokenizer.decode(expected)


def test_random_texts_have_the_same_ids(stock: Any, tokenizer: Tokenizer) -> None:
    """Runs of one character above all: there the two ways of joining pairs could differ."""
    draw = random.Random(0)
    characters = [
        "=",
        "a",
        " ",
        "t",
        "h",
        "e",
        "c",
        "\u00e9",
        "\u732b",
        "\U0001f408",
        "\n",
        "<",
        ">",
        "<image>",
        "\x00",
    ]
    texts = [
        "".join(draw.choice(characters) * draw.randint(1, draw.choice((1, 12))) for _ in range(draw.randint(1, 12)))
        for _ in range(3000)
    ]
    wrong = [
        text
        for text, expected in zip(texts, tokenizer.encode_batch(texts), strict=True)
        if stock(text, add_special_tokens=False).input_ids != expected
    ]
    assert wrong == []


def test_special_tokens_keep_their_ids_and_are_no_others(stock: Any, tokenizer: Tokenizer) -> None:
    special = tokenizer.special_tokens
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (special.bos, special.eos, special.pad)
    assert len({special.bos, special.eos, special.pad, stock.unk_token_id}) == 4
    assert (stock.boi_token, stock.eoi_token, stock.image_token) == ("<BoI>", "<EoI>", "<image>")
    assert stock.convert_tokens_to_ids(["<BoI>", "<EoI>", "<image>"]) == [special.boi, special.eoi, special.image]
    assert len(stock) == tokenizer.vocab_size


def test_prompts_may_hold_special_tokens_where_that_is_asked_for(
    transformers: ModuleType, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stock = transformers.AutoTokenizer.from_pretrained(write(tmp_path, tokenizer, True))
    special = tokenizer.special_tokens
    expected = [special.bos, special.boi, special.image, special.eoi, *tokenizer.encode("the cat")]
    assert stock("<BoI><image><EoI>the cat").input_ids == expected


def test_tokenizer_survives_being_saved(
    transformers: ModuleType, stock: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    stock.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"model_type": "unigram"}, "is not a byte-pair encoding, so"),
        ({"normalization_rule_name": "nmt_nfkc"}, "is not without normalisation, so"),
        ({"byte_fallback": False}, "is not with bytes for rare characters, so"),
        ({"add_dummy_prefix": False}, "is not with a space before the text, so"),
        ({"user_defined_symbols": ["xyz"]}, "is not without user-defined pieces, so"),
    ],
)
def test_other_tokenizers_are_refused(settings: dict[str, Any], fault: str, tmp_path: Path) -> None:
    """Each would give other ids than here without a word."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat, the dog on the log"] * 50),
        model_prefix=str(tmp_path / "other"),
        **{
            "model_type": "bpe",
            "vocab_size": 290,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "pad_id": 3,
            "pad_piece": PIECES["pad"],
            "control_symbols": [PIECES["boi"], PIECES["eoi"], PIECES["image"]],
            "minloglevel": 2,
            **settings,
        },
    )
    with pytest.raises(CheckpointError, match=fault):
        tokenizer_files((tmp_path / "other.model").read_bytes(), 64, False)
