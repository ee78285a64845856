"""The sentences of the digits example. Each function draws one at random."""

from __future__ import annotations

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANNOUNCED = 0.95
"""Share of announcements that name the digit; the others leave it open, as real text does."""
CAPTIONED = 0.9
"""Share of captions, and of sentences that refer back, that name the digit."""
SPELLED = 0.9
"""Share of names that are words (``seven``); the others are numerals (``7``)."""

# Sentences are short so that the name is a good part of what a small language model has read before an image:
# at the start it averages over its context, and a name among a hundred other words would take it long to find.
ANNOUNCEMENTS = (
    "Here is a {d}.",
    "Look, a {d}.",
    "Now comes {d}.",
    "The digit {d}.",
    "Somebody wrote {d}.",
    "Another {d}.",
    "Next is {d}.",
    "A {d} by hand.",
)
OPEN_ANNOUNCEMENTS = (
    "Look here.",
    "Another card.",
    "It has no title.",
)
CAPTIONS = (
    "A clear {d}.",
    "It is a {d}.",
    "Number {d}.",
    "The {d} in ink.",
)
OPEN_CAPTIONS = (
    "Drawn by hand.",
    "The paper is old.",
    "Artist unknown.",
)
FOLLOW_UPS = (
    "That was {d}.",
    "We all read {d}.",
    "You saw a {d}.",
    "So much for {d}.",
)
OPEN_FOLLOW_UPS = (
    "The ink is good.",
    "Turn the page.",
    "Nobody knows more.",
)
OPENINGS = (
    "How do people write?",
    "A box of cards.",
    "Writing by hand.",
    "Small drawings.",
)
CLOSINGS = (
    "More cards will follow.",
    "Thank you for reading.",
    "The box is empty now.",
)
SUBJECTS = ("The museum", "Our teacher", "The printer", "A visitor", "The old clerk", "My neighbour", "The machine")
VERBS = ("keeps", "sorts", "likes", "measures", "forgets", "repairs", "collects", "counts")
OBJECTS = ("the letters", "thin paper", "blue ink", "wooden frames", "long lists", "every stamp", "the morning post")


def announcement(digit: int, rng: np.random.Generator, named: float = ANNOUNCED) -> str:
    """Return the sentence before an image; names the digit with the probability ``named``."""
    return _about(digit, ANNOUNCEMENTS if rng.random() < named else OPEN_ANNOUNCEMENTS, rng)


def caption(digit: int, rng: np.random.Generator, named: float = CAPTIONED) -> str:
    """Return the sentence that an image is matched to; names the digit with the probability ``named``."""
    return _about(digit, CAPTIONS if rng.random() < named else OPEN_CAPTIONS, rng)


def follow_up(digit: int, rng: np.random.Generator, named: float = CAPTIONED) -> str:
    """Return a sentence after an image; names the digit with the probability ``named``."""
    return _about(digit, FOLLOW_UPS if rng.random() < named else OPEN_FOLLOW_UPS, rng)


def opening(rng: np.random.Generator) -> str:
    """Return the first sentence of a document."""
    return _pick(OPENINGS, rng)


def closing(rng: np.random.Generator) -> str:
    """Return the last sentence of a document."""
    return _pick(CLOSINGS, rng)


def filler(rng: np.random.Generator) -> str:
    """Return a sentence that has nothing to do with any image."""
    return " ".join(_pick(words, rng) for words in (SUBJECTS, VERBS, OBJECTS)) + "."


def _about(digit: int, templates: tuple[str, ...], rng: np.random.Generator) -> str:
    name = WORDS[digit] if rng.random() < SPELLED else str(digit)
    return _pick(templates, rng).format(d=name)


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
