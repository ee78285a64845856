"""The tokenizer. Oracles: exact round trips, and the ids of control symbols as stock SentencePiece reports them."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.tokenizer import PIECES, Tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
MARKS = list(PIECES.values())


def test_special_tokens_are_the_models_control_symbols(tokenizer: Tokenizer):
    stock = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = astuple(tokenizer.special_tokens)
    assert [stock.id_to_piece(token) for token in ids] == MARKS
    assert all(stock.is_control(token) for token in ids)
    assert len(set(ids)) == 6
    assert max(ids) < tokenizer.vocab_size == stock.vocab_size()


HOSTILE = [
    *MARKS,
    *(mark.upper() for mark in MARKS),
    *(mark.lower() for mark in MARKS),
    *("".join(pair) for pair in itertools.product(MARKS, repeat=2)),
    " ".join(MARKS),
    "<<s>>",
    "a<image>b",
    "\u2581<BoI>",
    "<unk>",
    "<0x0A>",
    "< image >",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_a_special_token(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert not set(ids) & {0, *astuple(tokenizer.special_tokens)}
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_a_tokenizer_trained_on_the_marks_does_not_learn_them(tmp_path: Path):
    texts = [f"{' '.join(MARKS)} {''.join(MARKS)} number {index}" for index in range(300)]
    tokenizer = train_tokenizer(texts, tmp_path / "hostile.model", 600)
    for text in texts[:10] + MARKS:
        ids = tokenizer.encode(text)
        assert not set(ids) & set(astuple(tokenizer.special_tokens))
        assert tokenizer.decode(ids) == text


# U+2581 is SentencePiece's own sign for a space; lone surrogates are no text.
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
@settings(max_examples=300, deadline=None)
def test_every_text_survives(text: str):
    tokenizer = survivor()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(6 < token < tokenizer.vocab_size for token in ids)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1))
@settings(max_examples=200, deadline=None)
def test_surfaces_are_the_text_token_by_token(text: str):
    tokenizer = survivor()
    special = tokenizer.special_tokens
    ids = tokenizer.encode(text)
    surfaces = tokenizer.surfaces([special.bos, *ids, special.boi])
    assert len(surfaces) == len(ids) + 2
    assert surfaces[0] == surfaces[-1] == ""
    assert "".join(surfaces) == f" {text}"


def test_surfaces_of_bytes_that_are_no_character():
    tokenizer = survivor()
    e, acute, letter = (*tokenizer.encode("\u00e9")[-2:], tokenizer.encode("a")[-1])
    assert tokenizer.surfaces([e, acute]) == ["", "\u00e9"]
    assert tokenizer.surfaces([e, letter])[0] == tokenizer.surfaces([letter, e])[1] == "\ufffd"
    assert tokenizer.surfaces([acute, e, tokenizer.special_tokens.eos]) == ["\ufffd", "\ufffd", ""]


_SURVIVOR: list[Tokenizer] = []


def survivor() -> Tokenizer:
    """A tokenizer that has seen almost nothing, so that most characters fall back to bytes."""
    if not _SURVIVOR:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            _SURVIVOR.append(train_tokenizer(["a small cat", "a small dog"], Path(folder) / "t.model", 300))
    return _SURVIVOR[0]


def test_empty_text_has_no_tokens(tokenizer: Tokenizer):
    assert tokenizer.encode("") == []


def test_training_is_deterministic_and_the_fingerprint_is_the_models_hash(tmp_path: Path):
    texts = [f"the {word} house number {index}" for index, word in enumerate(["red", "blue", "green"] * 50)]
    first = train_tokenizer(iter(texts), tmp_path / "one.model", 350)
    second = train_tokenizer(iter(texts), tmp_path / "elsewhere" / "two.model", 350)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "elsewhere" / "two.model").read_bytes()
    hashed = subprocess.run(["sha256sum", tmp_path / "one.model"], capture_output=True, text=True, check=True)
    assert first.fingerprint == second.fingerprint == hashed.stdout.split()[0]


def test_texts_longer_than_the_trainers_limit_are_used(tmp_path: Path):
    tokenizer = train_tokenizer(["mammoth " * 20_000], tmp_path / "long.model", 300)
    assert len(tokenizer.encode("mammoth")) == 1


def test_a_pickled_tokenizer_is_the_same(tokenizer: Tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode("A cat sees <image>") == tokenizer.encode("A cat sees <image>")


def train_stock(path: Path, **options: object) -> None:
    """Train a tokenizer as other projects have them, without this project's special tokens."""
    texts = [f"some text {index} about cats" for index in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )


def test_a_model_without_the_special_tokens_is_refused(tmp_path: Path):
    train_stock(tmp_path / "stock.model")
    with pytest.raises(ConfigError, match=r"stock.model has no special token <pad>.*tools/train_tokenizer.py"):
        Tokenizer.load(tmp_path / "stock.model")


def test_a_model_whose_marks_can_come_from_text_is_refused(tmp_path: Path):
    train_stock(tmp_path / "loose.model", pad_id=3, user_defined_symbols=["<BoI>", "<EoI>", "<image>"])
    with pytest.raises(ConfigError, match="<BoI> is not a control symbol"):
        Tokenizer.load(tmp_path / "loose.model")


def test_files_that_are_no_model_are_refused(tmp_path: Path):
    (tmp_path / "x.model").write_bytes(b"\xff\xff not a model")
    with pytest.raises(ConfigError, match=r"x.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(ConfigError, match=r"cannot read the tokenizer .*absent.model"):
        Tokenizer.load(tmp_path / "absent.model")


def test_a_model_with_a_flipped_bit_in_a_piece_is_refused(tmp_path: Path):
    model = train_tokenizer(["some text"], tmp_path / "whole.model", 300).model
    assert model.count(b"<0x00>") == 1
    (tmp_path / "flipped.model").write_bytes(model.replace(b"<0x00>", b"\xbc0x00>"))
    with pytest.raises(ConfigError, match=r"flipped.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "flipped.model")


def test_a_vocabulary_too_small_for_the_bytes_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="vocabulary of 100 .*choose a larger size"):
        train_tokenizer(["some text"], tmp_path / "small.model", 100)
    assert not (tmp_path / "small.model").exists()
    with pytest.raises(ConfigError, match="no text"):
        train_tokenizer(["", ""], tmp_path / "empty.model", 400)


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=None, check=False)


def test_the_tool_reads_shards_and_text_and_says_when_the_text_was_too_small(tmp_path: Path, mmc4, record):
    shard = mmc4.add_shard("docs_shard_0.jsonl.zip", [record(["A zebra walks.", "It walks on."], [("a.png", 0, 0.3)])])
    text = tmp_path / "more.txt"
    text.write_text("A giraffe looks down.\n", encoding="utf-8")
    done = run_tool("--input", shard, text, "--output", tmp_path / "t.model", "--vocab-size", 4000)
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    assert f"gave {tokenizer.vocab_size}" in done.stderr
    assert 263 < tokenizer.vocab_size < 4000
    # Characters that only one of the inputs has are pieces, not bytes, only if that input was read.
    assert len(tokenizer.encode("z")) <= 2
    assert len(tokenizer.encode("f")) <= 2
    failed = run_tool("--input", tmp_path / "none.jsonl", "--output", tmp_path / "u.model")
    assert failed.returncode == 1
    assert "none.jsonl" in failed.stderr
    assert "Traceback" not in failed.stderr
