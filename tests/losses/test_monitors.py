"""Collapse monitors. Oracle: closed forms (one-hot, collapsed and antipodal features), and double loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lcl_megatron.losses.monitors import alignment, background_similarity, effective_rank, feature_std

GENERATOR = torch.Generator().manual_seed(0)


def test_everything_when_there_is_no_pair_is_zero():
    nothing = torch.zeros(0, 8)
    assert [
        feature_std(nothing).item(),
        effective_rank(nothing).item(),
        alignment(nothing, nothing).item(),
        background_similarity(nothing, nothing).item(),
    ] == [0.0] * 4
    assert effective_rank(torch.zeros(3, 8)).item() == 0.0


@pytest.mark.parametrize("num_pairs", [1, 2, 50])
def test_features_when_collapsed_to_a_point_have_no_spread_and_one_direction(num_pairs):
    point = F.normalize(torch.randn(1, 768, generator=GENERATOR), dim=1).expand(num_pairs, -1)
    assert feature_std(point).item() == pytest.approx(0.0, abs=1e-9)
    assert effective_rank(point).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 4), (4, 9), (12, 4)])
def test_effective_rank_when_features_are_one_hot_is_their_number(shape):
    features = torch.eye(4).repeat(math.ceil(shape[0] / 4), math.ceil(shape[1] / 4))[: shape[0], : shape[1]]
    features[:, 4:] = 0
    assert effective_rank(features).item() == pytest.approx(4.0, abs=1e-9)


def test_effective_rank_when_singular_values_are_given_is_exp_of_their_entropy():
    singular = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    left, _ = torch.linalg.qr(torch.randn(20, 3, generator=GENERATOR, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(7, 3, generator=GENERATOR, dtype=torch.float64))
    entropy = -sum(p * math.log(p) for p in (1 / 2, 1 / 3, 1 / 6))
    assert effective_rank(left * singular @ right.T).item() == pytest.approx(math.exp(entropy), rel=1e-7)


def test_feature_std_when_features_are_antipodal_or_spread_has_closed_form():
    """Coordinates +-1/sqrt(D) have standard deviation 1/sqrt(D): exactly 1. Random directions: about 1."""
    corner = torch.ones(1, 16) / 4
    assert feature_std(torch.cat([corner, -corner])).item() == pytest.approx(1.0, rel=1e-6)
    spread = F.normalize(torch.randn(4000, 64, generator=GENERATOR), dim=1)
    assert feature_std(spread).item() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_pairs", [1, 2, 9])
def test_similarities_when_features_are_random_equal_double_loop(num_pairs, dtype):
    images, contexts = (F.normalize(torch.randn(num_pairs, 5, generator=GENERATOR), dim=1).to(dtype) for _ in range(2))
    cosine = [[float(a.double() @ b.double()) for b in contexts] for a in images]
    own = [cosine[i][i] for i in range(num_pairs)]
    others = [cosine[i][j] for i in range(num_pairs) for j in range(num_pairs) if i != j]
    assert alignment(images, contexts).item() == pytest.approx(sum(own) / num_pairs, abs=1e-12)
    expected = sum(others) / len(others) if others else 0.0
    assert background_similarity(images, contexts).item() == pytest.approx(expected, abs=1e-12)
