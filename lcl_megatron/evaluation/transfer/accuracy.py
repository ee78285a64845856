"""Top-k accuracy of closed-set classification, trained or zero-shot."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.evaluation.transfer.results import MetricSummary, UnitScores, summarize_units

RANKS = (1, 5)
"""The k of top-k."""


def top_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Return (N, len(RANKS)) int64: 1 where an image's class is among the first k of its scores.

    Args:
        scores: (N, K) of every class, any float dtype; with fewer than k classes every class is among the first.
        labels: (N,) int64, on the same device.
    """
    is_own = scores.topk(min(max(RANKS), scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([is_own[:, :rank].any(dim=1) for rank in RANKS], dim=1).long()


def top_metrics(hits: Mapping[int, np.ndarray], labels: np.ndarray, num_classes: int) -> tuple[MetricSummary, ...]:
    """Return top-1, and top-5 where there are more than five classes.

    Chance is the share of the k most frequent classes: the best answer without looking.

    Args:
        hits: by seed, (N, len(RANKS)) of the test images; see ``top_hits``.
        labels: (N,) int64 of the test images.
        num_classes: classes that the model chooses from.
    """
    frequencies = np.sort(np.bincount(labels))[::-1] / len(labels)
    ones = np.ones(len(labels), np.int64)
    return tuple(
        summarize_units(
            f"top-{rank}",
            {seed: UnitScores(found[:, column], ones) for seed, found in hits.items()},
            chance=float(frequencies[:rank].sum()),
        )
        for column, rank in enumerate(RANKS)
        if rank < num_classes
    )
