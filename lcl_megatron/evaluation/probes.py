"""How much a frozen encoder knows about the classes of images: nearest neighbours and a linear classifier.

Both judge the features as they are; the encoder is never tuned. The neighbours have no parameter to fit and show
how the space is arranged; the linear probe shows what can be read off it. A number means little alone: report it
next to the same encoder untrained, which is far above chance on simple images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

L2_CANDIDATES = tuple(10.0**exponent for exponent in (2, 1, 0, -1, -2, -3, -4, -5, -6))
"""L2 penalties of the linear probe, strong to weak; the validation images choose."""

_VALIDATION_SHARE = 0.2
_PATIENCE = 3
"""Penalties in a row that may bring no gain before the search ends."""
_SELECTION_TOLERANCE = 1e-4
"""Gradient at which a fit that only chooses the penalty ends."""
_SIMILARITIES_AT_ONCE = 32 * 2**20
"""Entries of the similarity matrix that exist at one time."""
_Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Accuracy:
    """A share of correctly classified images, with what the finite number of images leaves open."""

    num_correct: int
    """Test images whose class was found."""
    num_examples: int
    """Test images."""

    @property
    def value(self) -> float:
        """Share of correct images, 0 to 1."""
        return self.num_correct / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson score interval of the share at 95%.

            (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   z = 1.96

        It covers the choice of the test images, not the seed of the pre-training run.
        """
        n, p, z2 = self.num_examples, self.value, _Z_95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, centre - half), min(1.0, centre + half)


class Examples(NamedTuple):
    """Features with their classes."""

    features: Tensor
    """(N, F), float."""
    labels: Tensor
    """(N,) int64, classes from 0."""


@dataclass(frozen=True)
class ProbeReport:
    """What the probes say about one encoder on one labelled set."""

    encoder: str
    """Name of the encoder, as it shall stand in tables."""
    feature_size: int
    """Width F of the features."""
    num_classes: int
    """Classes of the training images."""
    num_train: int
    """Images the classifiers were fitted on; a fifth of them chose the linear probe's penalty."""
    chance: float
    """Share of the most frequent class among the test images: the best answer without looking."""
    knn: Accuracy
    """Weighted nearest neighbours."""
    linear: Accuracy
    """Linear classifier."""
    linear_l2: float
    """L2 penalty that the validation images chose."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON, with value and 95% interval of each accuracy."""
        fields = asdict(self)
        for method in ("knn", "linear"):
            accuracy: Accuracy = getattr(self, method)
            fields[method] |= {"value": accuracy.value, "interval_95": list(accuracy.interval)}
        return fields


def write_reports(reports: Sequence[ProbeReport], path: Path) -> None:
    """Write the reports as one JSON list to a file, whose folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([report.to_dict() for report in reports], indent=2) + "\n", encoding="utf-8")


def probe_encoder(encoder: str, train: Examples, test: Examples, k: int = 20, seed: int = 0) -> ProbeReport:
    """Fit and score both probes on one encoder's features.

    Args:
        encoder: name for the report.
        train: examples the classifiers are fitted on; also decides the validation images.
        test: examples of the report; nothing is chosen on them.
        k: neighbours; fewer if there are fewer training images.
        seed: of the validation split.

    Raises:
        ValueError: shapes or classes of the examples do not fit each other.
    """
    knn = knn_accuracy(*train, *test, k=min(k, len(train.labels)))
    linear, l2 = linear_probe_accuracy(*train, *test, seed=seed)
    return ProbeReport(
        encoder=encoder,
        feature_size=train.features.shape[1],
        num_classes=int((train.labels.bincount() > 0).sum()),
        num_train=len(train.labels),
        chance=int(test.labels.bincount().max()) / len(test.labels),
        knn=knn,
        linear=linear,
        linear_l2=l2,
    )


def markdown_table(reports: Sequence[ProbeReport]) -> str:
    """Return a Markdown table that compares encoders, one row each, accuracies in percent with 95% intervals."""
    lines = [
        "| encoder | features | train / test images | linear probe | k-NN | chance |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for report in reports:
        cells = [
            report.encoder.replace("|", "\\|"),
            str(report.feature_size),
            f"{report.num_train:,} / {report.linear.num_examples:,}",
            _percent(report.linear),
            _percent(report.knn),
            f"{report.chance:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(accuracy: Accuracy) -> str:
    """Return e.g. ``61.2% (59.8 to 62.6)``."""
    low, high = accuracy.interval
    return f"{accuracy.value:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def knn_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, k: int = 20, temperature: float = 0.07
) -> Accuracy:
    """Classify each test image by a vote of its ``k`` nearest training images, as DINO does (arXiv:2104.14294).

    Neighbours are nearest in cosine similarity; each votes for its class with weight exp(similarity / temperature).

    Args:
        train_x: (N, F) features, any float dtype; normalised here.
        train_y: (N,) int64 classes.
        test_x: (M, F) features.
        test_y: (M,) int64 classes.
        k: neighbours that vote.
        temperature: smaller = nearer neighbours count for more.

    Raises:
        ValueError: shapes do not fit, or there are fewer than ``k`` training images.
    """
    _check_examples(train_x, train_y, test_x, test_y)
    if not 1 <= k <= len(train_x):
        raise ValueError(f"k = {k}, but there are {len(train_x)} training images; choose k between 1 and that")
    num_classes = int(train_y.max()) + 1
    train_x = F.normalize(train_x.float(), dim=1)
    test_x = F.normalize(test_x.float(), dim=1)
    num_correct = 0
    rows = max(1, _SIMILARITIES_AT_ONCE // len(train_x))
    for begin in range(0, len(test_x), rows):
        similarity, neighbours = (test_x[begin : begin + rows] @ train_x.T).topk(k, dim=1)
        # The largest similarity of a row is subtracted: a common factor, and float32 overflows beyond exp(88).
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(weight), num_classes).scatter_add_(1, train_y[neighbours], weight)
        num_correct += int((votes.argmax(dim=1) == test_y[begin : begin + rows]).sum())
    return Accuracy(num_correct, len(test_y))


def linear_probe_accuracy(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int = 0
) -> tuple[Accuracy, float]:
    """Fit multinomial logistic regression on frozen features and score it on the test images.

    A fifth of the training images of every class is set aside to choose the L2 penalty among ``L2_CANDIDATES``
    (the stronger one when two are equally good); then the classifier is fitted on all training images. Features are
    standardised with mean and deviation of the images that the fit uses. Deterministic: full batches in float64,
    and a split that depends on ``seed`` alone.

    Args:
        train_x: (N, F) features, any float dtype.
        train_y: (N,) int64 classes from 0.
        test_x: (M, F) features.
        test_y: (M,) int64 classes.
        seed: of the validation split.

    Returns:
        The accuracy, and the penalty that was chosen.

    Raises:
        ValueError: shapes do not fit, or there are fewer than two classes or two images of a class, so that there
            is nothing to tell apart or to validate on.
    """
    _check_examples(train_x, train_y, test_x, test_y)
    counts = train_y.bincount()
    if len(counts[counts > 0]) < 2 or int(counts[counts > 0].min()) < 2:
        raise ValueError(
            "the linear probe needs at least 2 classes with 2 training images each; "
            f"images per class: {counts.tolist()}"
        )
    is_validation = _validation_mask(train_y, seed)
    l2 = _choose_l2(train_x, train_y, is_validation)
    scale = _Standardizer(train_x)
    classifier = fit_logistic_regression(scale(train_x), train_y, l2)
    return classifier.score(scale(test_x), test_y), l2


@dataclass(frozen=True)
class LinearClassifier:
    """Scores of K classes as a linear function of features."""

    weight: Tensor
    """(K, F) float64."""
    bias: Tensor
    """(K,) float64."""

    def score(self, features: Tensor, labels: Tensor) -> Accuracy:
        """Return the accuracy on features (M, F) float64 with classes (M,)."""
        predicted = F.linear(features, self.weight, self.bias).argmax(dim=1)
        return Accuracy(int((predicted == labels).sum()), len(labels))


def fit_logistic_regression(
    features: Tensor, labels: Tensor, l2: float, start: LinearClassifier | None = None, tolerance: float = 1e-7
) -> LinearClassifier:
    """Return the minimum of mean cross-entropy + l2/2 * |W|^2; the bias is not penalised.

    The objective is convex, so the result does not depend on ``start``, which only saves iterations. Features of
    encoders are strongly correlated, and plain L-BFGS takes hundreds of iterations on them. So it works in
    coordinates V, with W = V P and P = (C/K + l2)^(-1/2), where C = Q diag(c) Q^T is the features' second moment and
    1/K the curvature of the cross-entropy at uniform scores: there the curvature is near 1 in every direction.

    Args:
        features: (N, F) float64.
        labels: (N,) int64 classes from 0.
        l2: penalty, positive; scikit-learn's ``C`` is 1 / (N * l2).
        start: weights to begin at; None = zero.
        tolerance: largest entry of the gradient, in the coordinates V, at which the fit ends.
    """
    num_classes = int(labels.max()) + 1 if start is None else len(start.bias)
    moments, basis = torch.linalg.eigh(features.T @ features / len(features))
    step = (moments.clamp(min=0) / num_classes + l2).rsqrt()
    rotated = features @ (basis * step)
    weight = features.new_zeros(num_classes, features.shape[1]) if start is None else start.weight @ basis / step
    bias = features.new_zeros(num_classes) if start is None else start.bias.clone()
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()], max_iter=500, history_size=20,
        tolerance_grad=tolerance, tolerance_change=1e-12, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(rotated, weight, bias), labels) + l2 / 2 * (weight * step).square().sum()
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearClassifier((weight.detach() * step) @ basis.T, bias.detach())


class _Standardizer:
    """Shift and scale features to mean 0 and deviation 1 of the images it was made from; constant ones become 0."""

    def __init__(self, features: Tensor) -> None:
        features = features.double()
        self._mean = features.mean(dim=0)
        deviation = features.std(dim=0, unbiased=False)
        # Rounding leaves a constant feature with a deviation near 1e-16 of its size, not 0: that is not a signal.
        is_constant = deviation <= 1e-9 * self._mean.abs()
        self._factor = torch.where(is_constant, torch.zeros_like(deviation), 1 / deviation)

    def __call__(self, features: Tensor) -> Tensor:
        return (features.double() - self._mean) * self._factor


def _choose_l2(features: Tensor, labels: Tensor, is_validation: Tensor) -> float:
    """Return the penalty with the best validation accuracy; candidates are visited from strong to weak.

    The search ends after three candidates in a row that did not help: weak penalties overfit, and their fits, badly
    conditioned, take most of the time. For the same reason these fits end early; the final one does not.
    """
    scale = _Standardizer(features[~is_validation])
    fit_x, fit_y = scale(features[~is_validation]), labels[~is_validation]
    held_x, held_y = scale(features[is_validation]), labels[is_validation]
    classifier: LinearClassifier | None = None
    best_l2, best_correct, without_gain = L2_CANDIDATES[0], -1, 0
    for l2 in L2_CANDIDATES:
        classifier = fit_logistic_regression(fit_x, fit_y, l2, start=classifier, tolerance=_SELECTION_TOLERANCE)
        num_correct = classifier.score(held_x, held_y).num_correct
        if num_correct > best_correct:
            best_l2, best_correct, without_gain = l2, num_correct, 0
        else:
            without_gain += 1
        if without_gain == _PATIENCE:
            break
    return best_l2


def _validation_mask(labels: Tensor, seed: int) -> Tensor:
    """Return (N,) bool, True for a random fifth of the images of every class, at least one of each."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = shuffled[labels.cpu()[shuffled] == label]
        if len(members) == 0:
            continue
        mask[members[: max(1, round(_VALIDATION_SHARE * len(members)))]] = True
    return mask.to(labels.device)


def _check_examples(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Raise ValueError unless features and classes of both sets fit together."""
    for name, x, y in (("training", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.shape != x.shape[:1] or len(x) == 0:
            raise ValueError(
                f"{name} features {tuple(x.shape)} and classes {tuple(y.shape)}; expected (N, F) and (N,) with N > 0"
            )
        if y.dtype != torch.int64 or int(y.min()) < 0:
            raise ValueError(f"{name} classes are {y.dtype} from {y.min()}; expected int64 from 0")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} features hold values that are not finite; no distance to them exists")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"training features are {train_x.shape[1]} wide, test features {test_x.shape[1]}")
    unknown = sorted(set(test_y.tolist()) - set(train_y.tolist()))
    if unknown:
        raise ValueError(f"test classes {unknown} have no training image; they could never be found")
