"""Oracle: the tokenizer's own ids of the whole text, which pieces must add up to; positions counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library
from lcl_megatron.evaluation.vision_language.sequences import (
    IGNORED,
    IMAGE_INDEX,
    Piece,
    SequenceBuilder,
    SequenceError,
    collate,
)
from tests.evaluation.vision_language import tiny_models

try:
    stock_library("transformers")
except LibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

PROMPT = "USER: What is it? ASSISTANT:"
TOKENIZERS = {"bytes": tiny_models.byte_tokenizer, "sentencepiece": tiny_models.sentencepiece_tokenizer}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def builder(tokenizer: Any, max_length: int = 200) -> SequenceBuilder:
    return SequenceBuilder(tokenizer, num_patches=4, max_length=max_length)


def test_pieces_have_the_ids_of_the_whole_text(tokenizer: Any) -> None:
    sequence = builder(tokenizer).build([Piece(PROMPT), Piece(" A cat.", is_target=True, ends_turn=True)], 0)
    whole = tokenizer.encode(f"{PROMPT} A cat.")
    assert sequence.ids.tolist() == [*whole, tokenizer.eos_token_id]
    num_prompt = len(tokenizer.encode(PROMPT))
    assert (sequence.labels[:num_prompt] == IGNORED).all()
    assert sequence.labels[num_prompt:].tolist() == sequence.ids[num_prompt:].tolist()
    assert sequence.num_targets == len(whole) - num_prompt + 1


def test_the_prompt_of_a_question_begins_its_training_sequence(tokenizer: Any) -> None:
    prompt = [Piece(f"<image>\n{PROMPT}")]
    asked = builder(tokenizer).build(prompt, 1)
    answered = builder(tokenizer).build([*prompt, Piece(" A cat.", is_target=True, ends_turn=True)], 1)
    assert answered.ids[: len(asked.ids)].tolist() == asked.ids.tolist()
    assert asked.num_targets == 0


def test_an_image_is_one_entry_between_the_ids_of_its_neighbours(tokenizer: Any) -> None:
    sequence = builder(tokenizer).build([Piece("USER: <image>\nWhat<image> ?")], 2)
    ids = sequence.ids.tolist()
    places = [index for index, number in enumerate(ids) if number == IMAGE_INDEX]
    assert sequence.num_images == len(places) == 2
    before, between = ids[: places[0]], ids[places[0] + 1 : places[1]]
    assert before == tokenizer.encode("USER: ")
    assert between == tokenizer.encode("\nWhat", add_special_tokens=False)


def test_ids_are_kept_even_where_the_vocabulary_knows_the_placeholder() -> None:
    tokenizer = tiny_models.byte_tokenizer()
    assert builder(tokenizer).build([Piece("an <image> tag")], 0).ids.tolist() == tokenizer.encode("an <image> tag")
    target = builder(tokenizer).build([Piece("<image>"), Piece("say <image>", is_target=True)], 1)
    assert target.num_images == 1


def test_a_tokenizer_without_a_first_token() -> None:
    tokenizer = tiny_models.byte_tokenizer(bos=False)
    sequence = builder(tokenizer).build([Piece("<image>"), Piece("A cat.", is_target=True)], 1)
    assert sequence.ids[0] == IMAGE_INDEX
    assert tokenizer.decode(sequence.ids[1:]) == "A cat."


def test_long_sequences_lose_their_end() -> None:
    tokenizer = tiny_models.byte_tokenizer()
    pieces = [Piece("ab<image>cd<image>ef")]
    whole = builder(tokenizer).build(pieces, 2).ids
    positions = np.cumsum(np.where(whole == IMAGE_INDEX, 4, 1))
    for max_length in range(5, int(positions[-1]) + 2):
        kept = builder(tokenizer, max_length).build(pieces, 2)
        assert len(kept.ids) == int((positions <= max_length).sum())
        assert kept.ids.tolist() == whole[: len(kept.ids)].tolist()
    # An image that does not fit whole is not there at all.
    assert builder(tokenizer, int(positions[-1]) - 3).build(pieces, 2).num_images == 1


@pytest.mark.parametrize("count", [1, 3])
def test_images_and_placeholders_must_agree(count: int) -> None:
    with pytest.raises(SequenceError, match=f"{count} images, but 2 times <image>; every image needs one"):
        builder(tiny_models.byte_tokenizer()).build([Piece("<image><image>")], count)


def test_impossible_builders() -> None:
    tokenizer = tiny_models.byte_tokenizer()
    with pytest.raises(SequenceError, match="an image takes 4 positions of max_length = 4; make room for text"):
        builder(tokenizer, 4)
    tokenizer.eos_token = None
    with pytest.raises(SequenceError, match="no end-of-text token"):
        builder(tokenizer)


def test_collate_fills_up_on_the_right() -> None:
    tokenizer = tiny_models.byte_tokenizer(bos=False)
    texts = ["a dog", "<image>", "a"]
    sequences = [builder(tokenizer).build([Piece(text)], text.count("<image>")) for text in texts]
    batch = collate(sequences, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert batch.lengths.tolist() == [len(sequence.ids) for sequence in sequences]
    for row, sequence in enumerate(sequences):
        assert batch.ids[row, : len(sequence.ids)].tolist() == sequence.ids.tolist()
        assert (batch.labels[row, len(sequence.ids) :] == IGNORED).all()
