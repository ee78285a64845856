"""Recall of retrieval.

Oracles: open_clip's ``get_clip_metrics`` where every image has one caption; the formula of CLIP_benchmark
(``recall_at_k`` on a matrix of positive pairs, any hit counts) with five captions; closed forms for chance.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_megatron.evaluation.retrieval import recall
from lcl_megatron.evaluation.retrieval.recall import RANKS, chance_recalls, recalls, retrieval_ranks
from tests.stock import stock_or_skip


def make_features(num_images: int, captions: list[int], noise: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit features of images and of their captions, which are the images' with noise."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(num_images, 16, generator=random)
    image_of_text = torch.repeat_interleave(torch.arange(num_images), torch.tensor(captions))
    texts = images[image_of_text] + noise * torch.randn(len(image_of_text), 16, generator=random)
    return F.normalize(images, dim=1), F.normalize(texts, dim=1), image_of_text


def benchmark_recalls(images: Tensor, texts: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """CLIP_benchmark's ``zeroshot_retrieval.evaluate``, from its scores on: texts in rows, any hit counts."""
    scores = texts @ images.T
    positive_pairs = torch.zeros_like(scores, dtype=torch.bool)
    positive_pairs[torch.arange(len(scores)), image_of_text] = True

    def recall_at_k(scores: Tensor, positive_pairs: Tensor, k: int) -> Tensor:
        indices = torch.topk(scores, k, dim=1)[1]
        hits = F.one_hot(indices, num_classes=scores.shape[1])
        true_positives = (hits * positive_pairs[:, None, :]).sum(dim=(1, 2))
        return true_positives / positive_pairs.sum(dim=1)

    return {
        **{f"IR@{k}": float((recall_at_k(scores, positive_pairs, k) > 0).double().mean()) for k in RANKS},
        **{f"TR@{k}": float((recall_at_k(scores.T, positive_pairs.T, k) > 0).double().mean()) for k in RANKS},
    }


@pytest.mark.parametrize("captions", [[5] * 60, [1] * 60, [1, 5, 3, 2] * 15])
def test_recalls_equal_clip_benchmark_s(captions: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "ROWS_AT_ONCE", 7)
    features = make_features(60, captions)
    expected = benchmark_recalls(*features)
    found = recalls(*features)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name].value - value) < 1e-6
    assert 0.1 < expected["IR@1"] < 0.9
    assert expected["TR@1"] < expected["TR@10"]


def test_recalls_equal_open_clip_s() -> None:
    stock_or_skip("open_clip")
    metrics = stock_or_skip("open_clip_train.train").get_clip_metrics
    images, texts, image_of_text = make_features(60, [1] * 60)
    expected = metrics(images, texts, torch.tensor(1.0))
    found = recalls(images, texts, image_of_text)
    for k in RANKS:
        assert abs(found[f"TR@{k}"].value - expected[f"image_to_text_R@{k}"]) < 1e-6
        assert abs(found[f"IR@{k}"].value - expected[f"text_to_image_R@{k}"]) < 1e-6


def test_a_collapsed_encoder_has_no_recall() -> None:
    images, texts = torch.ones(20, 4) / 2, torch.ones(40, 4) / 2
    image_of_text = torch.repeat_interleave(torch.arange(20), 2)
    text_ranks, image_ranks = retrieval_ranks(images, texts, image_of_text)
    assert text_ranks.tolist() == [38] * 20
    assert image_ranks.tolist() == [19] * 40
    assert all(score.value == 0 for score in recalls(images, texts, image_of_text).values())


def test_units_are_images_with_all_their_captions() -> None:
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 1, 1, 2]]
    image_of_text = torch.tensor([0, 0, 1, 2])  # the second caption describes the wrong image
    score = recalls(images, texts, image_of_text)["IR@1"]
    assert (score.sums.tolist(), score.counts.tolist()) == ([1, 1, 1], [2, 1, 1])


def test_chance_is_the_share_of_random_orders() -> None:
    chances = chance_recalls(np.array([1, 5, 2, 4]))
    assert chances["IR@1"] == 0.25
    assert chances["IR@5"] == 1.0
    assert chances["TR@1"] == pytest.approx(3 / 12)
    misses = [math.comb(11, 5), math.comb(7, 5), math.comb(10, 5), math.comb(8, 5)]
    assert chances["TR@5"] == pytest.approx(1 - sum(misses) / 4 / math.comb(12, 5))
    assert chance_recalls(np.array([1, 1]))["TR@10"] == 1.0


def test_features_that_are_not_finite_are_refused_and_not_always_right() -> None:
    images, texts, image_of_text = make_features(4, [2] * 4)
    images[2, 0] = math.nan
    with pytest.raises(ValueError, match=r"the features of 1 of 4 images are not finite; .*lower fit\.lr"):
        recalls(images, texts, image_of_text)
    with pytest.raises(ValueError, match="the features of 2 of 8 captions are not finite"):
        recalls(texts[::2].clone(), torch.where(image_of_text[:, None] == 1, math.inf, texts), image_of_text)
