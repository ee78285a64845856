"""The accuracy of VQAv2 and VizWiz: agreement with ten people, after the official clean-up of answers.

An answer that n of the other nine people gave counts min(n / 3, 1); the accuracy of a question is the mean over the
ten ways to leave one person out. Goyal et al., Making the V in VQA Matter, 2017 (arXiv 1612.00837); the rules are
those of ``vqaEval.py``, the evaluation of the VQA challenge, with everything that is odd about them, so that numbers
can be compared:

- answers are cleaned only where the ten differ; where all agree, spelling counts;
- a punctuation mark is deleted if it stands next to a space anywhere in the answer, or if there is a comma between
  digits (whatever the mark); else it becomes a space;
- full stops are deleted unless a digit follows, at most 32 of them;
- number words up to ten become digits (``none`` becomes 0), articles vanish, forgotten apostrophes are put back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_FULL_STOPS = 32
"""``vqaEval.py`` passes the flag re.UNICODE (32) where ``re.sub`` takes the largest number of replacements."""
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_SPELLINGS = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTIONS
    for index, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the last one is a slip of the official table
"""Words that lack one apostrophe, with their correct spelling."""


def clean_answer(answer: str) -> str:
    """Return an answer as the VQA challenge compares it; see the module's docstring for the rules."""
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(answer).lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(answer: str) -> str:
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    cleaned = answer
    for mark in _PUNCTUATION:
        deleted = has_number or mark + " " in answer or " " + mark in answer
        cleaned = cleaned.replace(mark, "" if deleted else " ")
    return _FULL_STOP.sub("", cleaned, count=_MAX_FULL_STOPS)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of one answer under the rules of VQAv2, 0 to 1.

    Args:
        prediction: the model's answer.
        answers: what people answered, ten in VQAv2.

    Raises:
        ValueError: there is no answer to compare with.
    """
    prediction = _one_line(prediction)
    answers = [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = clean_answer(prediction)
        answers = [clean_answer(answer) for answer in answers]
    return _mean_over_subsets(prediction, answers)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of one answer under the rules of VizWiz, 0 to 1.

    Unlike in VQAv2 the prediction is always cleaned, and what people answered is taken as it was published.

    Raises:
        ValueError: there is no answer to compare with.
    """
    return _mean_over_subsets(clean_answer(_one_line(prediction)), answers)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _mean_over_subsets(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean of min(matches / 3, 1) over all subsets that leave one answer out.

    The subsets that leave a match out have one match less; the others have all.
    """
    if not answers:
        raise ValueError("a question without reference answers cannot be scored; give the annotations of the split")
    matches = sum(answer == prediction for answer in answers)
    without_one, with_all = min(1.0, max(matches - 1, 0) / 3), min(1.0, matches / 3)
    return (matches * without_one + (len(answers) - matches) * with_all) / len(answers)
