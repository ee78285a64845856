"""Oracles: the prompts that LLaVA's ``conversation.py`` prints for ``vicuna_v1`` and ``plain``; genuine records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.evaluation.dialogue.conversations import (
    SYSTEM_MESSAGE,
    Conversation,
    ConversationError,
    Turn,
    conversation_pieces,
    described,
    question_pieces,
    read_conversations,
)


def entry(*texts: str, first: str = "human", **fields: Any) -> dict[str, Any]:
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    messages = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": "1", "conversations": messages, **fields}


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "conversations.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_vicuna_template_of_several_turns(tmp_path: Path) -> None:
    (conversation,) = read_conversations(
        write(tmp_path, [entry("What is it?\n<image>", "A cat.", "Sure?", "Yes.", image="a.jpg")])
    )
    assert conversation.images == ("a.jpg",)
    pieces = conversation_pieces(conversation, "vicuna_v1")
    printed = "".join(piece.text + ("</s>" if piece.ends_turn else "") for piece in pieces)
    assert printed == (
        f"{SYSTEM_MESSAGE} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    )
    assert [piece.text for piece in pieces if piece.is_target] == [" A cat.", " Yes."]


def test_plain_template_shows_only_image_and_answer(tmp_path: Path) -> None:
    (conversation,) = read_conversations(write(tmp_path, [entry("<image>\nDescribe it.", "a cat", image="a.jpg")]))
    pieces = conversation_pieces(conversation, "plain")
    assert [(piece.text, piece.is_target, piece.ends_turn) for piece in pieces] == [
        ("<image>", False, False),
        ("a cat\n", True, False),
    ]


def test_the_prompt_of_a_question_begins_its_conversation() -> None:
    (prompt,) = question_pieces("What is it?", has_image=True)
    asked = conversation_pieces(Conversation(("a.jpg",), (Turn("<image>\nWhat is it?", "A cat."),)), "vicuna_v1")
    assert prompt == asked[0]
    assert question_pieces("Why?", has_image=False)[0].text == f"{SYSTEM_MESSAGE} USER: Why? ASSISTANT:"


def test_what_is_kept_and_what_is_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            entry("Hello", "Hi", "a", "b"),
            entry("Unasked.", "What?", "That.", first="gpt", image=""),
            entry("<image> and <image>?", "Both.", image=["a.jpg", "b.jpg"]),
            entry("What does <image> mean in HTML?", "An image."),
        ],
    )
    chat, unasked, two, literal = read_conversations(path)
    assert (len(chat.turns), chat.images) == (2, ())
    assert unasked.turns == (Turn("What?", "That."),)
    assert two.turns[0].question == "<image> and <image>?"
    assert literal.turns[0].question == "What does <image> mean in HTML?"
    assert described([chat, unasked, two, literal]) == {
        "conversations": 4,
        "turns": 5,
        "images": 2,
        "without_image": 3,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "conversations.json: malformed JSON"),
        ("{}", "holds dict; expected list"),
        ([], "has no conversation; give a file of LLaVA's form"),
        ([5], "entry 0: wrong type: int; expected an object"),
        ([{"id": 1}], "entry 0: missing field: the record has no conversations"),
        ([entry("a")], "entry 0: wrong order of turns: human; expected human, gpt, human, gpt"),
        ([entry()], "wrong order of turns: none"),
        ([entry("a", "b"), entry("a", "b", image="x.jpg")], "entry 1: wrong number of placeholders: 0 times"),
        ([entry("a", "b", image=3)], "image is 3; expected a name, or a list of names"),
        ([{"conversations": ["x"]}], "a message is str; expected an object"),
        ([{"conversations": [{"from": "human"}]}], "a message has no value"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConversationError, match=message):
        read_conversations(write(tmp_path, content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match="there is no file .*absent.json"):
        read_conversations(tmp_path / "absent.json")


def test_plain_template_refuses_a_dialogue() -> None:
    dialogue = Conversation(("a.jpg",), (Turn("<image>", "b"), Turn("c", "d")))
    with pytest.raises(ConversationError, match=r"one image and one turn; found 1 images \(a.jpg\) and 2 turns"):
        conversation_pieces(dialogue, "plain")


def test_genuine_records(shared_data: Path) -> None:
    folder = shared_data / "upstream_samples" / "llava"
    for name, count in (("llava_instruct_schema_12", 12), ("llava_custom_data_doc_sample", 1)):
        conversations = read_conversations(folder / f"{name}.json")
        assert len(conversations) == count
        assert all(conversation.turns[0].question.startswith("<image>\n") for conversation in conversations)
