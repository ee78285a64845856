"""The SentencePiece tokenizer as ``tokenizer.json`` for transformers' ``AutoTokenizer``: the same ids, no own code.

SentencePiece's byte-pair encoding joins the pair whose piece scores highest, the leftmost one first. ``tokenizers``
has a list of pairs instead: here, all pairs that make a piece, in the order of the pieces' scores.
"""

from __future__ import annotations

import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.data.tokenizer import PIECES, SPACE, Tokenizer

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6
"""Types of pieces in a SentencePiece model."""


def tokenizer_files(model: bytes, max_length: int, specials_in_text: bool) -> dict[str, str]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json``.

    With ``add_special_tokens=False`` they give the ids of ``Tokenizer.encode``; without, ``<s>`` comes first, as in
    training.

    Args:
        model: the SentencePiece model.
        max_length: positions of the language model.
        specials_in_text: whether ``<image>`` in a text is the special token, which a processor of prompts with images
            needs, or seven characters like any others, which is what a text was in training.

    Raises:
        CheckpointError: the model is not of the kind that tools/train_tokenizer.py trains.
    """
    described = tokenizer_json(model)
    config = {
        "tokenizer_class": TOKENIZER_CLASS,
        "bos_token": PIECES["bos"],
        "eos_token": PIECES["eos"],
        "pad_token": PIECES["pad"],
        "unk_token": described["model"]["unk_token"],
        "extra_special_tokens": {f"{name}_token": PIECES[name] for name in ("boi", "eoi", "image")},
        "model_max_length": max_length,
        # Generation goes on from the last position.
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not specials_in_text,
        "added_tokens_decoder": {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in described["added_tokens"]
        },
    }
    return {"tokenizer.json": _text(described), "tokenizer_config.json": _text(config)}


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """Return the contents of ``tokenizer.json``; see ``tokenizer_files``."""
    special = Tokenizer(model).special_tokens
    parsed = sentencepiece_model_pb2.ModelProto()
    parsed.ParseFromString(model)
    _check(parsed)
    pieces = [piece.piece for piece in parsed.pieces]
    (unknown,) = (token for token, piece in enumerate(parsed.pieces) if piece.type == _UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token,
                "content": pieces[token],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token, piece in enumerate(parsed.pieces)
            if piece.type in (_CONTROL, _UNKNOWN)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _begin_with(pieces[special.bos], special.bos),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: token for token, piece in enumerate(pieces)},
            "merges": _merges({piece.piece: piece.score for piece in parsed.pieces if piece.type == _NORMAL}),
        },
    }


def _check(parsed: Any) -> None:
    """Raise CheckpointError unless ``tokenizer_json`` describes what the SentencePiece model does."""
    trainer, normalizer = parsed.trainer_spec, parsed.normalizer_spec
    found = {
        "a byte-pair encoding": trainer.model_type == trainer.BPE,
        "with bytes for rare characters": trainer.byte_fallback,
        "without normalisation": not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces,
        "with a space before the text": normalizer.add_dummy_prefix and normalizer.escape_whitespaces,
        "without user-defined pieces": all(
            piece.type in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE) for piece in parsed.pieces
        ),
    }
    if wrong := [name for name, holds in found.items() if not holds]:
        raise CheckpointError(
            f"the tokenizer is not {', '.join(wrong)}, so transformers would give other ids; expected a model of "
            "tools/train_tokenizer.py"
        )


def _merges(scores: dict[str, float]) -> list[list[str]]:
    """Return every pair of pieces that makes a piece, best piece first, and the longest left part first."""
    pairs = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [[left, right] for _, _, left, right in sorted(pairs)]


def _begin_with(piece: str, token: int) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": piece, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {piece: {"id": piece, "ids": [token], "tokens": [piece]}},
    }


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
