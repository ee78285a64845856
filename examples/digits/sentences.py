"""The sentences of the digits example. Each function draws one at random."""

from __future__ import annotations

import numpy as np

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANNOUNCED = 0.9
"""Share of announcements that name the digit; the others leave it open, as real text does."""

ANNOUNCEMENTS = (
    "The next picture shows the digit {d}.",
    "Here is how somebody writes {d}.",
    "Now look at this {d}.",
    "We come to the number {d}.",
    "The writer was then asked for a {d}.",
    "On the following card stands {d}.",
    "Next on the list is {d}, drawn by hand.",
    "Another {d} was found among the old papers.",
    "This time it is a {d} in a hurry.",
    "Please compare it with this {d}.",
    "The clerk wrote {d} on the envelope.",
    "A child drew the {d} below.",
)
OPEN_ANNOUNCEMENTS = (
    "The next picture speaks for itself.",
    "Here is another card from the box.",
    "See for yourself what was written.",
    "The following drawing has no title.",
)
CAPTIONS = (
    "The shape of the {d} is easy to see.",
    "A hand-written {d}, scanned and coloured.",
    "This is the {d} from our collection.",
    "Number {d}, artist unknown.",
    "The {d} was painted on coloured paper.",
)
OPEN_CAPTIONS = (
    "The paper has aged a little.",
    "It was scanned with a very small number of points.",
    "The colours were chosen at random.",
    "Nobody remembers who held the pen.",
)
FOLLOW_UPS = (
    "Everybody in the room read it as {d}.",
    "You have just seen a {d}.",
    "Not every {d} is as clear as that one.",
    "With this the {d} is done.",
    "The sorting machine put it on the pile of {d}.",
)
OPEN_FOLLOW_UPS = (
    "Turn the page when you are ready.",
    "The ink is still good.",
    "That was all we know about this card.",
)
OPENINGS = (
    "This page is about writing by hand.",
    "Notes from the archive of small drawings.",
    "How do people write numbers?",
    "A short tour through a box of cards.",
    "The post office sorts letters by hand.",
)
CLOSINGS = (
    "More cards will follow next week.",
    "Thank you for reading.",
    "The box is empty now.",
    "The next page goes on with other hands.",
)
SUBJECTS = ("The museum", "Our teacher", "The printer", "A visitor", "The old clerk", "My neighbour", "The machine")
VERBS = ("keeps", "sorts", "likes", "measures", "forgets", "repairs", "collects", "counts")
OBJECTS = ("the letters", "thin paper", "blue ink", "wooden frames", "long lists", "every stamp", "the morning post")
ENDINGS = ("on quiet days", "without a word", "before lunch", "in the back room", "as a hobby", "with great care")


def announcement(digit: int, rng: np.random.Generator) -> str:
    """Return the sentence before an image; names the digit most of the time."""
    return _about(digit, ANNOUNCEMENTS if rng.random() < ANNOUNCED else OPEN_ANNOUNCEMENTS, rng)


def caption(digit: int, rng: np.random.Generator) -> str:
    """Return the sentence that an image is matched to; names the digit half of the time."""
    return _about(digit, CAPTIONS if rng.random() < 0.5 else OPEN_CAPTIONS, rng)


def follow_up(digit: int, rng: np.random.Generator) -> str:
    """Return a sentence after an image; names the digit half of the time."""
    return _about(digit, FOLLOW_UPS if rng.random() < 0.5 else OPEN_FOLLOW_UPS, rng)


def opening(rng: np.random.Generator) -> str:
    """Return the first sentence of a document."""
    return _pick(OPENINGS, rng)


def closing(rng: np.random.Generator) -> str:
    """Return the last sentence of a document."""
    return _pick(CLOSINGS, rng)


def filler(rng: np.random.Generator) -> str:
    """Return a sentence that has nothing to do with any image."""
    return " ".join(_pick(words, rng) for words in (SUBJECTS, VERBS, OBJECTS, ENDINGS)) + "."


def _about(digit: int, templates: tuple[str, ...], rng: np.random.Generator) -> str:
    name = WORDS[digit] if rng.random() < 0.75 else str(digit)
    return _pick(templates, rng).format(d=name)


def _pick(choices: tuple[str, ...], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]
