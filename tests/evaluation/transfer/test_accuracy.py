"""Top-k accuracy. Oracle: hits and frequencies that are counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcl_megatron.evaluation.transfer.accuracy import top_hits, top_metrics


def test_hits_are_the_classes_among_the_first_scores() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.0]] * 3)
    assert top_hits(scores, torch.tensor([1, 2, 0])).tolist() == [[1, 1], [0, 1], [0, 0]]


def test_with_few_classes_every_class_is_among_the_first_five() -> None:
    assert top_hits(torch.tensor([[0.1, 0.9]] * 2), torch.tensor([0, 1])).tolist() == [[0, 1], [1, 1]]


def test_top_5_counts_the_first_five() -> None:
    labels = np.array([0, 0, 0, 1, 2, 3, 4, 5, 6, 6])
    hits = {0: np.array([[1, 1], [0, 1], [0, 0], [0, 1], *[[0, 0]] * 6])}
    top1, top5 = top_metrics(hits, labels, 7)
    assert (top1.name, top1.mean, top1.chance) == ("top-1", 0.1, 0.3)
    assert (top5.name, top5.mean) == ("top-5", 0.3)
    assert top5.chance == pytest.approx(0.8)
    assert [metric.name for metric in top_metrics(hits, labels, 5)] == ["top-1"]
