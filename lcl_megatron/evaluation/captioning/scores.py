"""BLEU and CIDEr of captions as the COCO caption evaluation computes them: by its own code, pycocoevalcap.

Captions are tokenized by its Penn Treebank tokenizer, a Java program. There is no other way here: with another
tokenizer the numbers would be other numbers, and CIDEr of another kind must not be called CIDEr.

BLEU is of the whole set (Papineni et al., 2002); CIDEr is the mean over images, weighted by how rare their n-grams are
in the references of the set (Vedantam et al., 2015, arXiv 1411.5726), so that it depends on which images are in it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CIDER = "CIDEr"
BLEU = tuple(f"BLEU-{n}" for n in (1, 2, 3, 4))
ORDERS = 4
"""Longest n-grams of BLEU."""


class CaptionScoreError(ValueError):
    """Captions that cannot be scored, or a scorer that is not installed; the message says what to do."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions, with what their intervals need."""

    values: dict[str, float]
    """``CIDEr`` and ``BLEU-1`` to ``BLEU-4``, in the scale of pycocoevalcap: 1.2 is what papers call 120."""
    cider: np.ndarray
    """(N,) float64: CIDEr of every image."""
    matches: np.ndarray
    """(N, 4) float64: n-grams of the caption that a reference has, n = 1 to 4."""
    ngrams: np.ndarray
    """(N, 4) float64: n-grams of the caption."""
    lengths: np.ndarray
    """(N, 2) float64: words of the caption, and of the reference nearest in length."""

    def resampled(self, name: str, images: np.ndarray) -> float:
        """Return a score of some images, repeated ones counted again.

        BLEU is computed anew from the sums of counts; CIDEr is the mean of the images' own, with the n-gram weights
        of the whole set.

        Args:
            name: key of ``values``.
            images: (n,) int64.
        """
        if name == CIDER:
            return float(self.cider[images].mean())
        order = BLEU.index(name) + 1
        matches, ngrams = self.matches[images].sum(axis=0), self.ngrams[images].sum(axis=0)
        length, reference = self.lengths[images].sum(axis=0)
        # Only so much above 0 that nothing is divided by it, as in pycocoevalcap.
        precisions = (matches[:order] + 1e-15) / (ngrams[:order] + 1e-9)
        ratio = (length + 1e-15) / (reference + 1e-9)
        brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        return float(np.prod(precisions) ** (1 / order) * brevity)


def check_scorer() -> None:
    """Raise ``CaptionScoreError`` if captions could not be scored, before hours are spent on making them."""
    _scorer("eval")
    if shutil.which("java") is None:
        raise CaptionScoreError(
            "there is no java, which the tokenizer of the COCO caption evaluation needs; install a Java runtime "
            "(8 or later), or score the written predictions elsewhere with pycocoevalcap"
        )


def score_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Return BLEU and CIDEr of captions.

    Args:
        predictions: one caption for each of N images; may be empty.
        references: what people wrote about each image, at least one caption.

    Raises:
        CaptionScoreError: the scorer is not installed, or references are missing.
    """
    check_scorer()
    if not predictions or len(predictions) != len(references) or not all(references):
        raise CaptionScoreError(
            f"{len(predictions)} captions and references for {len(references)} images, of which "
            f"{sum(not captions for captions in references)} have none; every image needs a caption and a reference"
        )
    tokenized_references = _tokenize(references)
    tokenized = _tokenize([[prediction] for prediction in predictions])
    bleu_scorer = _scorer("bleu.bleu_scorer").BleuScorer(n=ORDERS)
    for image, captions in tokenized_references.items():
        bleu_scorer += (tokenized[image][0], captions)
    bleu, _ = bleu_scorer.compute_score(option="closest", verbose=0)
    cider, per_image = _scorer("cider.cider").Cider().compute_score(tokenized_references, tokenized)
    counts = bleu_scorer.ctest
    nearest = [
        min((abs(length - entry["testlen"]), length) for length in lengths)[1]
        for entry, (lengths, _) in zip(counts, bleu_scorer.crefs, strict=True)
    ]
    return CaptionScores(
        values={CIDER: float(cider), **dict(zip(BLEU, map(float, bleu), strict=True))},
        cider=np.asarray(per_image, dtype=np.float64),
        matches=np.array([entry["correct"] for entry in counts], dtype=np.float64),
        ngrams=np.array([entry["guess"] for entry in counts], dtype=np.float64),
        lengths=np.array([[e["testlen"], length] for e, length in zip(counts, nearest, strict=True)], dtype=np.float64),
    )


def _tokenize(captions: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """Return captions as the evaluation's tokenizer splits them, by the index of their image."""
    # The tokenizer works line by line: whatever ends a line inside a caption would shift all captions behind it.
    lines = {
        image: [{"caption": " ".join(caption.split())} for caption in of_image]
        for image, of_image in enumerate(captions)
    }
    found: dict[int, list[str]] = _scorer("tokenizer.ptbtokenizer").PTBTokenizer().tokenize(lines)
    if [len(of_image) for of_image in captions] != [len(found.get(image, ())) for image in range(len(captions))]:
        raise CaptionScoreError(
            f"the tokenizer of the caption evaluation returned {sum(map(len, found.values()))} captions for "
            f"{sum(map(len, captions))}; run java -version, and see what it printed above"
        )
    return found


def _scorer(module: str) -> Any:
    """Return a module of pycocoevalcap."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(f"pycocoevalcap.{module}")
    except ImportError as error:
        raise CaptionScoreError(
            f"captions are scored by pycocoevalcap, which cannot be imported ({error}); install it: "
            "pip install 'lcl_megatron[eval]'"
        ) from error
