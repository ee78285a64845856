"""Oracle: the two functions of LLaVA's ``eval_science_qa.py`` (parse the text, look the letter up), written out."""

from __future__ import annotations

import re

import pytest

from lcl_megatron.evaluation.dialogue.choices import choice_prompt, chosen_option


def official_choice(text: str, num_options: int) -> int:
    options = ["A", "B", "C", "D", "E"]
    text = text.replace("\n", ". ")
    answer = "FAILED"
    if text.strip() in options:
        answer = text.strip()
    elif len(text) >= 3 and text[0] in options and text[1:3] == ". ":
        answer = text[0]
    elif "The answer is " in text:
        match = re.search(r"The answer is ([A-E])\.", text) or re.search(r"The answer is ([A-E])", text)
        answer = match.group(1) if match else "FAILED"
    return options.index(answer) if answer in options[:num_options] else -1


@pytest.mark.parametrize(
    "text",
    [
        "A",
        " B ",
        "C. cat",
        "C.cat",
        "The answer is B.",
        "So. The answer is D",
        "The answer is b",
        "",
        "AB",
        "E",
        "A\n",
        "a",
    ],
)
@pytest.mark.parametrize("num_options", [2, 4, 5])
def test_chosen_option_equals_the_official_rules(text: str, num_options: int) -> None:
    assert chosen_option(text, num_options) == official_choice(text, num_options)


def test_prompt_lists_context_question_and_options() -> None:
    assert choice_prompt("What is it?", ["a cat", "a dog"], "Look.").split("\n") == [
        "Look.",
        "What is it?",
        "A. a cat",
        "B. a dog",
        "Answer with the option's letter from the given choices directly.",
    ]
    assert choice_prompt("What is it?", ["a cat"]).startswith("What is it?\nA. a cat\n")
