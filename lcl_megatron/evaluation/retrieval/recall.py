"""Recall of image-text retrieval, where an image has several captions.

TR@k: share of images for which *any* of their captions is among the k most similar of all captions.
IR@k: share of captions whose image is among the k most similar of all images.

This is the protocol of the literature on COCO and Flickr30k (Karpathy and Li 2015, CLIP, CLIP_benchmark). Equal scores
count against: a foreign caption or image that is as similar as the right one comes first. An encoder that gives all
images the same feature so has a recall of 0 and not of 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.evaluation.transfer.results import UnitScores

RANKS = (1, 5, 10)
"""The k of recall at k."""
ROWS_AT_ONCE = 512
"""Rows of the similarity matrix that exist at one time."""


def retrieval_ranks(images: Tensor, texts: Tensor, image_of_text: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many wrong answers come before the first right one.

    Args:
        images: (I, D) features, of length 1 for cosine similarity.
        texts: (T, D) features of all captions.
        image_of_text: (T,) int64, which image a caption belongs to; every image has one.

    Returns:
        (I,) int64, for each image: captions of other images at least as similar as its most similar own one.
        (T,) int64, for each caption: other images at least as similar as its own.

    Raises:
        ValueError: a feature is not finite. Nothing is at least as similar as NaN, so that its recall would be 1.
    """
    for kind, features in (("images", images), ("captions", texts)):
        num_bad = int((~torch.isfinite(features).all(dim=1)).sum())
        if num_bad:
            raise ValueError(
                f"the features of {num_bad} of {len(features)} {kind} are not finite; the weights are damaged or "
                "overflow: set fit.precision = fp32, or lower fit.lr"
            )
    text_ranks = torch.empty(len(images), dtype=torch.int64)
    for begin in range(0, len(images), ROWS_AT_ONCE):
        scores = images[begin : begin + ROWS_AT_ONCE] @ texts.T
        rows = torch.arange(begin, begin + len(scores), device=scores.device)
        is_own = image_of_text[None] == rows[:, None]
        best = scores.masked_fill(~is_own, -math.inf).amax(dim=1, keepdim=True)
        text_ranks[begin : begin + len(scores)] = ((scores >= best) & ~is_own).sum(dim=1).cpu()
    image_ranks = torch.empty(len(texts), dtype=torch.int64)
    for begin in range(0, len(texts), ROWS_AT_ONCE):
        own = image_of_text[begin : begin + ROWS_AT_ONCE, None]
        scores = texts[begin : begin + ROWS_AT_ONCE] @ images.T
        # The own image is as similar as itself, hence the 1.
        image_ranks[begin : begin + len(scores)] = (scores >= scores.gather(1, own)).sum(dim=1).cpu() - 1
    return text_ranks, image_ranks


def recalls(images: Tensor, texts: Tensor, image_of_text: Tensor) -> dict[str, UnitScores]:
    """Return TR@k and IR@k for k of 1, 5, 10; units are images with all their captions.

    Args:
        images: see ``retrieval_ranks``.
        texts: see there.
        image_of_text: see there.
    """
    text_ranks, image_ranks = retrieval_ranks(images, texts, image_of_text)
    captions = np.bincount(image_of_text.cpu().numpy(), minlength=len(images))
    scores = {f"TR@{k}": UnitScores((text_ranks < k).long().numpy(), np.ones(len(images), np.int64)) for k in RANKS}
    for k in RANKS:
        hits = np.bincount(image_of_text.cpu().numpy(), weights=(image_ranks < k).numpy(), minlength=len(images))
        scores[f"IR@{k}"] = UnitScores(hits.astype(np.int64), captions)
    return scores


def chance_recalls(captions_per_image: np.ndarray) -> dict[str, float]:
    """Return the expected recalls of a random order, given the number of captions of each image, (I,)."""
    num_images, num_texts = len(captions_per_image), int(captions_per_image.sum())

    def miss(own: int, k: int) -> float:
        """All k drawn captions are foreign: C(T - n, k) / C(T, k)."""
        return math.comb(num_texts - own, k) / math.comb(num_texts, k) if k <= num_texts else 0.0

    chances = {f"TR@{k}": 1 - float(np.mean([miss(n, k) for n in captions_per_image.tolist()])) for k in RANKS}
    return chances | {f"IR@{k}": min(1.0, k / num_images) for k in RANKS}
