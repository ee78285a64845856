r"""Conversations about images in LLaVA's JSON form, and the templates that turn them into text.

::

    [{"id": "1", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                     {"from": "gpt", "value": "A cat."}]}]

Both of LLaVA-1.5's training files have it: ``blip_laion_cc_sbu_558k.json`` (alignment) and ``llava_v1_5_mix665k.json``
(tuning; many turns, and some conversations without an image).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lcl_megatron.data.readers.records import RecordError, get_field, get_text, kind_name
from lcl_megatron.evaluation.dialogue.benchmark import BenchmarkError
from lcl_megatron.evaluation.dialogue.benchmarks.files import read_json
from lcl_megatron.evaluation.vision_language.sequences import PLACEHOLDER, Piece

Template = Literal["plain", "vicuna_v1"]
"""``plain``: only image and answer, for alignment. ``vicuna_v1``: a system message, USER and ASSISTANT."""

SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""What ``vicuna_v1`` begins with."""


class ConversationError(ValueError):
    """A file of conversations that cannot be used; the message names file and entry."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    """What the user says; ``<image>`` stands where an image is."""
    answer: str
    """What the assistant says, which is learnt."""


@dataclass(frozen=True)
class Conversation:
    """Turns about images, or about none."""

    images: tuple[str, ...]
    """Names of the images, in the order of their placeholders."""
    turns: tuple[Turn, ...]
    """At least one."""


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations of a file.

    As in LLaVA, an only placeholder moves to the beginning of its question, on a line of its own, and an answer that
    nobody asked for is left out at the beginning of a conversation.

    Raises:
        ConversationError: the file is missing or damaged, an entry has another form, or its placeholders do not fit
            its images.
    """
    try:
        entries = read_json(path, list)
    except BenchmarkError as error:
        raise ConversationError(str(error)) from error
    conversations = []
    for number, entry in enumerate(entries):
        try:
            conversations.append(_conversation(entry))
        except RecordError as error:
            raise ConversationError(
                f"{path}: entry {number}: {error.reason}: {error.detail}; mend the entry or leave it out"
            ) from error
    if not conversations:
        raise ConversationError(f"{path} has no conversation; give a file of LLaVA's form")
    return conversations


def _conversation(entry: Any) -> Conversation:
    if not isinstance(entry, dict):
        raise RecordError("wrong type", f"{kind_name(entry)}; expected an object")
    messages = [_message(message) for message in get_field(entry, "conversations", list)]
    if messages and messages[0][0] == "gpt":
        messages = messages[1:]
    speakers = [speaker for speaker, _ in messages]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise RecordError("wrong order of turns", f"{', '.join(speakers) or 'none'}; expected human, gpt, human, gpt")
    images = _image_names(entry.get("image"))
    questions = [text for _, text in messages[::2]]
    if images:
        count = sum(question.count(PLACEHOLDER) for question in questions)
        if count != len(images):
            raise RecordError("wrong number of placeholders", f"{count} times {PLACEHOLDER} for {len(images)} images")
        questions = [_placeholder_first(question) for question in questions]
    answers = [text for _, text in messages[1::2]]
    return Conversation(images, tuple(map(Turn, questions, answers)))


def _message(message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise RecordError("wrong type", f"a message is {kind_name(message)}; expected an object")
    return get_text(message, "from", "a message"), get_text(message, "value", "a message")


def _image_names(value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(name, str) and name for name in names):
        raise RecordError("wrong type", f"image is {value!r}; expected a name, or a list of names")
    return tuple(names)


def _placeholder_first(question: str) -> str:
    if question.count(PLACEHOLDER) != 1:
        return question
    return f"{PLACEHOLDER}\n{question.replace(PLACEHOLDER, '').strip()}".strip()


def conversation_pieces(conversation: Conversation, template: Template) -> list[Piece]:
    r"""Return a conversation as text, its answers as targets.

    ::

        plain       <image>ANSWER\n
        vicuna_v1   SYSTEM USER: QUESTION ASSISTANT: ANSWER</s>USER: QUESTION ASSISTANT: ANSWER</s>

    Raises:
        ConversationError: ``plain`` for a conversation that is not one image and one answer.
    """
    if template == "plain":
        if len(conversation.images) != 1 or len(conversation.turns) != 1:
            raise ConversationError(
                f"template plain takes one image and one turn; found {len(conversation.images)} images "
                f"({', '.join(conversation.images[:3])}) and {len(conversation.turns)} turns: use vicuna_v1"
            )
        return [Piece(PLACEHOLDER), Piece(conversation.turns[0].answer + "\n", is_target=True)]
    pieces = []
    for number, turn in enumerate(conversation.turns):
        pieces.append(Piece(_asked(turn.question, is_first=number == 0)))
        pieces.append(Piece(f" {turn.answer}", is_target=True, ends_turn=True))
    return pieces


def question_pieces(question: str, has_image: bool) -> list[Piece]:
    """Return the prompt of a question in the template ``vicuna_v1``; the answer follows."""
    return [Piece(_asked(f"{PLACEHOLDER}\n{question}" if has_image else question, is_first=True))]


def _asked(question: str, is_first: bool) -> str:
    return f"{SYSTEM_MESSAGE + ' ' if is_first else ''}USER: {question} ASSISTANT:"


def described(conversations: Sequence[Conversation]) -> dict[str, int]:
    """Return counts of a set of conversations, for reports."""
    return {
        "conversations": len(conversations),
        "turns": sum(len(conversation.turns) for conversation in conversations),
        "images": sum(len(conversation.images) for conversation in conversations),
        "without_image": sum(not conversation.images for conversation in conversations),
    }
