"""Probes of frozen features.

Oracles: a brute-force nearest-neighbour vote in numpy, scikit-learn's logistic regression, closed-form Wilson
intervals published by others, and synthetic classes whose best accuracy is known.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lcl_megatron.evaluation.probes import (
    L2_CANDIDATES,
    Accuracy,
    Examples,
    ProbeReport,
    fit_logistic_regression,
    knn_accuracy,
    linear_probe_accuracy,
    markdown_table,
    probe_encoder,
    write_reports,
)


def make_clusters(per_class: int, spread: float, seed: int, num_classes: int = 5, width: int = 16) -> Examples:
    """Return Gaussian clusters; the centres are the same for every ``seed``."""
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_classes).repeat(per_class)
    noise = torch.randn(len(labels), width, generator=generator)
    return Examples(centres[labels] + spread * noise, labels)


def knn_by_hand(train: Examples, test: Examples, k: int, temperature: float) -> int:
    """Return the number of correct votes, one test image and one neighbour at a time."""
    unit = [x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True) for x in (train[0], test[0])]
    num_correct = 0
    for feature, label in zip(unit[1], test.labels.tolist(), strict=True):
        similarity = unit[0] @ feature
        votes: dict[int, float] = {}
        for neighbour in np.argsort(-similarity)[:k]:
            vote = int(train.labels[neighbour])
            votes[vote] = votes.get(vote, 0.0) + math.exp(similarity[neighbour] / temperature)
        num_correct += max(votes, key=lambda name: votes[name]) == label
    return num_correct


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 1.0), (100, 0.02)])
def test_knn_equals_brute_force(k: int, temperature: float) -> None:
    train, test = make_clusters(40, 2.0, seed=1), make_clusters(30, 2.0, seed=2)
    accuracy = knn_accuracy(*train, *test, k=k, temperature=temperature)
    assert accuracy == Accuracy(knn_by_hand(train, test, k, temperature), 150)
    assert 0.25 < accuracy.value < 0.95  # neither trivial nor hopeless, so that a wrong vote would show


def test_knn_in_blocks_equals_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = make_clusters(40, 2.0, seed=1), make_clusters(30, 2.0, seed=2)
    at_once = knn_accuracy(*train, *test)
    monkeypatch.setattr("lcl_megatron.evaluation.probes._SIMILARITIES_AT_ONCE", 7 * len(train.labels))
    assert knn_accuracy(*train, *test) == at_once


def test_knn_at_a_tiny_temperature_does_not_overflow() -> None:
    train, test = make_clusters(20, 0.05, seed=1), make_clusters(20, 0.05, seed=2)
    assert knn_accuracy(*train, *test, temperature=1e-4).value == 1.0


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_logistic_regression_equals_scikit_learn(l2: float) -> None:
    train = make_clusters(30, 1.5, seed=1)
    features = train.features.double()
    ours = fit_logistic_regression(features, train.labels, l2)
    theirs = LogisticRegression(C=1 / (len(features) * l2), tol=1e-10, max_iter=10_000)
    theirs.fit(features.numpy(), train.labels.numpy())
    np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=1e-3 * np.abs(theirs.coef_).max())
    # The bias has no penalty: a constant added to all classes changes nothing, so only differences compare.
    ours_bias, theirs_bias = ours.bias.numpy(), theirs.intercept_
    # Both stop at a gradient, not at a distance: a weak penalty leaves them further apart (0.0020 at 1e-4).
    np.testing.assert_allclose(ours_bias - ours_bias.mean(), theirs_bias - theirs_bias.mean(), atol=5e-3)


def test_logistic_regression_does_not_depend_on_its_start() -> None:
    train = make_clusters(30, 1.5, seed=1)
    features = train.features.double()
    cold = fit_logistic_regression(features, train.labels, 1e-3)
    warm = fit_logistic_regression(features, train.labels, 1e-3, fit_logistic_regression(features, train.labels, 1.0))
    torch.testing.assert_close(cold.weight, warm.weight, atol=1e-4, rtol=1e-3)


def test_linear_probe_equals_scikit_learn_at_the_chosen_penalty() -> None:
    train, test = make_clusters(40, 2.0, seed=1), make_clusters(60, 2.0, seed=2)
    accuracy, l2 = linear_probe_accuracy(*train, *test)
    mean, deviation = train.features.mean(0), train.features.std(0, unbiased=False)
    theirs = LogisticRegression(C=1 / (len(train.labels) * l2), tol=1e-10, max_iter=10_000)
    theirs.fit(((train.features - mean) / deviation).numpy(), train.labels.numpy())
    predicted = theirs.predict(((test.features - mean) / deviation).numpy())
    assert abs(accuracy.num_correct - int((predicted == test.labels.numpy()).sum())) <= 1
    assert l2 in L2_CANDIDATES


def test_both_probes_find_separable_classes_and_nothing_in_noise() -> None:
    train, test = make_clusters(40, 0.2, seed=1), make_clusters(40, 0.2, seed=2)
    report = probe_encoder("separable", train, test)
    assert report.knn.value == 1.0
    assert report.linear.value == 1.0

    generator = torch.Generator().manual_seed(3)
    noise = [Examples(torch.randn(400, 16, generator=generator), train.labels.repeat(2)) for _ in range(2)]
    report = probe_encoder("noise", *noise)
    assert report.chance == pytest.approx(0.2)
    for accuracy in (report.knn, report.linear):
        low, high = accuracy.interval
        assert low - 0.05 < 0.2 < high + 0.05


def test_linear_probe_reads_a_direction_that_neighbours_cannot_see() -> None:
    """The class is the sign of one faint feature among loud ones; standardising makes it readable."""

    def make(seed: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        features = 50 * torch.randn(600, 8, generator=generator)
        labels = torch.randint(2, (600,), generator=generator)
        return Examples(torch.cat([features, 0.01 * (2.0 * labels[:, None] - 1)], dim=1), labels)

    report = probe_encoder("faint", make(1), make(2))
    assert report.linear.value > 0.99
    assert report.knn.value < 0.6


def test_linear_probe_chooses_a_strong_penalty_when_features_outnumber_images() -> None:
    def make(seed: int, count: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(2, (count,), generator=generator)
        features = torch.randn(count, 200, generator=generator)
        features[:, :20] += 0.5 * (2.0 * labels[:, None] - 1)
        return Examples(features, labels)

    train, test = make(1, 100), make(2, 2000)
    accuracy, l2 = linear_probe_accuracy(*train, *test)
    assert l2 >= 1e-2
    assert accuracy.value > 0.8


def test_probes_are_deterministic_and_ignore_the_global_generator() -> None:
    train, test = make_clusters(40, 2.0, seed=1), make_clusters(40, 2.0, seed=2)
    first = probe_encoder("a", train, test)
    torch.manual_seed(12345)
    assert probe_encoder("a", train, test) == first


def test_test_labels_have_no_influence_on_what_is_chosen() -> None:
    train, test = make_clusters(40, 2.0, seed=1), make_clusters(40, 2.0, seed=2)
    shuffled = test.labels[torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))]
    assert linear_probe_accuracy(*train, *test)[1] == linear_probe_accuracy(*train, test.features, shuffled)[1]


def test_constant_features_do_not_disturb_the_linear_probe() -> None:
    train, test = make_clusters(40, 1.0, seed=1), make_clusters(40, 1.0, seed=2)
    plain = linear_probe_accuracy(*train, *test)
    constant = torch.full((len(train.labels), 1), 0.1)
    with_constant = [torch.cat([x, constant], dim=1) for x in (train.features, test.features)]
    assert linear_probe_accuracy(with_constant[0], train.labels, with_constant[1], test.labels) == plain


def test_missing_class_numbers_are_allowed() -> None:
    train, test = make_clusters(40, 0.2, seed=1), make_clusters(40, 0.2, seed=2)
    report = probe_encoder("gaps", Examples(train.features, 3 * train.labels), Examples(test.features, 3 * test.labels))
    assert report.num_classes == 5
    assert report.linear.value == 1.0


@pytest.mark.parametrize(
    ("num_correct", "num_examples", "low", "high"),
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(num_correct: int, num_examples: int, low: float, high: float) -> None:
    assert Accuracy(num_correct, num_examples).interval == pytest.approx((low, high), abs=5e-5)


def test_report_survives_json_and_the_table_compares_encoders(tmp_path: Path) -> None:
    common = {"feature_size": 768, "num_classes": 10, "num_train": 5000, "chance": 0.1, "linear_l2": 0.01}
    trained = ProbeReport(encoder="LCL", knn=Accuracy(2400, 4500), linear=Accuracy(2754, 4500), **common)  # type: ignore[arg-type]
    untrained = ProbeReport(encoder="untrained", knn=Accuracy(1350, 4500), linear=Accuracy(1800, 4500), **common)  # type: ignore[arg-type]

    write_reports([trained], tmp_path / "new" / "probe.json")
    (fields,) = json.loads((tmp_path / "new" / "probe.json").read_text())
    assert fields["linear"]["num_correct"] == 2754
    assert fields["linear"]["value"] == pytest.approx(0.612)
    assert fields["linear"]["interval_95"] == pytest.approx(trained.linear.interval)

    rows = markdown_table([trained, untrained]).splitlines()
    assert rows[2] == ("| LCL | 768 | 5,000 / 4,500 | 61.2% (59.8 to 62.6) | 53.3% (51.9 to 54.8) | 10.0% |")
    assert rows[3].startswith("| untrained |")
    assert len({row.count("|") for row in rows}) == 1


def bad_examples() -> list[tuple[Examples, Examples, str]]:
    train, test = make_clusters(4, 1.0, seed=1), make_clusters(4, 1.0, seed=2)
    nan = train.features.clone()
    nan[0, 0] = math.nan
    return [
        (Examples(train.features, train.labels[:-1]), test, r"training features \(20, 16\) and classes \(19,\)"),
        (Examples(train.features, train.labels.int()), test, "int32"),
        (Examples(train.features, train.labels - 1), test, "from -1"),
        (Examples(nan, train.labels), test, "not finite"),
        (train, Examples(test.features[:, :8], test.labels), "16 wide, test features 8"),
        (train, Examples(test.features, test.labels + 1), r"test classes \[5\]"),
    ]


@pytest.mark.parametrize(("train", "test", "message"), bad_examples())
def test_examples_that_do_not_fit_are_refused(train: Examples, test: Examples, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn_accuracy(*train, *test, k=3)
    with pytest.raises(ValueError, match=message):
        linear_probe_accuracy(*train, *test)


def test_too_few_images_are_refused() -> None:
    train, test = make_clusters(1, 1.0, seed=1), make_clusters(1, 1.0, seed=2)
    with pytest.raises(ValueError, match="k = 6, but there are 5"):
        knn_accuracy(*train, *test, k=6)
    with pytest.raises(ValueError, match="2 training images each"):
        linear_probe_accuracy(*train, *test)
    one_class: Tensor = torch.zeros(20, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least 2 classes"):
        linear_probe_accuracy(torch.randn(20, 4), one_class, torch.randn(20, 4), one_class)
