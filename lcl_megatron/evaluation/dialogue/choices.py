"""Multiple choice: how options are put to a model, and which of them an answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDE"
"""Letters of the options, in order; no benchmark here has more."""
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""What LLaVA-1.5 adds to every multiple-choice question, in training and in evaluation."""

_THE_ANSWER_IS = re.compile(r"The answer is ([A-E])")


def choice_prompt(question: str, options: Sequence[str], context: str = "") -> str:
    """Return a multiple-choice question in LLaVA-1.5's form.

    ::

        [context]
        What is this?
        A. a cat
        B. a dog
        Answer with the option's letter from the given choices directly.
    """
    listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*([context] if context else []), question, *listed, LETTER_INSTRUCTION])


def chosen_option(text: str, num_options: int) -> int:
    """Return the index of the option that an answer names, or -1; the rules are those of LLaVA's ScienceQA script.

    An answer names an option if it is its letter, begins with letter, full stop and space, or says
    ``The answer is X``. A letter beyond the question's options names none.
    """
    line = text.replace("\n", ". ")
    if line.strip() and line.strip() in set(LETTERS):
        letter = line.strip()
    elif len(line) >= 3 and line[0] in LETTERS and line[1:3] == ". ":
        letter = line[0]
    elif match := _THE_ANSWER_IS.search(line):
        letter = match.group(1)
    else:
        return -1
    index = LETTERS.index(letter)
    return index if index < num_options else -1
