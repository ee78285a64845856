"""The contrast of a whole step, on random patterns of image counts over ranks and micro-batches.

Oracle: the full similarity matrix of all valid pairs of the global batch, float64, one process, ``F.cross_entropy``
and autograd.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.config import LossConfig, ParallelConfig
from lcl_megatron.data.batch import PackedBatch, StepLayout
from lcl_megatron.model.lcl import LCLOutput
from lcl_megatron.parallel.agreement import AgreedStep, StepFlags
from lcl_megatron.parallel.groups import ProcessGroups, initialize
from lcl_megatron.training.objective import Objective
from tests.distributed import run_distributed

PATTERNS = 1000
RANKS = 4
WIDTH = 6
TOLERANCE = 1e-12
"""Absolute, for gradients of a mean over pairs at a temperature of 0.1; seen: at most 3e-15."""
WEIGHT = 0.7


@dataclass(frozen=True)
class Pattern:
    """Image counts of every micro-batch and rank, and which images are pairs."""

    num_images: np.ndarray
    has_context: np.ndarray
    image_ok: np.ndarray

    @property
    def is_pair(self) -> np.ndarray:
        return self.has_context & self.image_ok


def make_pattern(seed: int) -> Pattern:
    """Every tenth step has no image at all; others have between none and all of their micro-batches empty."""
    random = np.random.default_rng(seed)
    shape = (int(random.integers(1, 5)), RANKS)
    counts = random.integers(0, 4, shape) * (random.random(shape) < random.random()) * (seed % 10 > 0)
    total = int(counts.sum())
    return Pattern(counts, random.random(total) < 0.8, random.random(total) < 0.9)


def features_of(pattern: Pattern, seed: int) -> tuple[Tensor, Tensor]:
    """Features of all images, in the order of ``has_context``; NaN where there is no pair."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(pattern.has_context), WIDTH)
    pooled = torch.randn(shape, generator=generator, dtype=torch.float64)
    context = pooled + torch.randn(shape, generator=generator, dtype=torch.float64)
    for features in (pooled, context):
        features[~torch.from_numpy(pattern.is_pair)] = torch.nan
    return pooled, context


def brute_force(pattern: Pattern, seed: int) -> tuple[float, list[Tensor]]:
    """Mean over pairs and its gradients by pooled latents, context features and log temperature."""
    pooled, context = features_of(pattern, seed)
    is_pair = torch.from_numpy(pattern.is_pair)
    leaves = [
        pooled.requires_grad_(),
        context.requires_grad_(),
        torch.tensor(2.3, dtype=torch.float64).requires_grad_(),
    ]
    images, contexts = F.normalize(pooled[is_pair], dim=1), F.normalize(context[is_pair], dim=1)
    if not len(images):
        return 0.0, [torch.zeros_like(leaf) for leaf in leaves]
    scores, own = leaves[2].exp() * images @ contexts.T, torch.arange(len(images))
    loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    gradients = torch.autograd.grad(loss, leaves)
    return float(loss.detach()), [gradient.nan_to_num(0.0) for gradient in gradients]


def _blank_batch(num_images: int) -> PackedBatch:
    nothing: Any = torch.zeros(0)
    return PackedBatch(*[nothing] * 5, 0, *[nothing] * 6, images=None, num_images=num_images)


def _outputs(pattern: Pattern, seed: int, dp_rank: int, layout: StepLayout) -> list[LCLOutput]:
    """What a model would give for a rank's micro-batches, as leaves."""
    pooled, context = features_of(pattern, seed)
    logit_scale = torch.tensor(2.3, dtype=torch.float64).requires_grad_()
    outputs = []
    for micro_batch in range(layout.num_images.shape[0]):
        begin, end = layout.image_range(micro_batch, dp_rank)
        own = [f[begin:end] if end > begin else torch.full((1, WIDTH), torch.nan).double() for f in (pooled, context)]
        token_losses = torch.zeros(1, dtype=torch.float64).requires_grad_()
        outputs.append(LCLOutput(token_losses, own[0].requires_grad_(), own[1].requires_grad_(), logit_scale))
    return outputs


def _differences(pattern: Pattern, seed: int, groups: ProcessGroups) -> list[float]:
    """Return how far this rank's gradients are from brute force; loss and temperature summed over ranks elsewhere."""
    layout = StepLayout(pattern.num_images, pattern.has_context, 1, 1, 1)
    micro_batches = tuple(_blank_batch(int(n)) for n in pattern.num_images[:, groups.dp_rank])
    agreed = AgreedStep(seed, layout, micro_batches, pattern.image_ok, False)
    loss = LossConfig(contrastive_loss_weight=WEIGHT, contrastive_tile_size=1 + seed % 7)
    objective = Objective(loss, agreed, groups)
    outputs = _outputs(pattern, seed, groups.dp_rank, layout)
    objective = Objective(loss, agreed, groups, objective.contrast_of_features(outputs))
    parts = []
    for index, output in enumerate(outputs):
        total, part = objective(index, output)
        total.backward()
        parts.append(part)
    expected_loss, expected = brute_force(pattern, seed)
    differences = []
    for index, output in enumerate(outputs):
        begin, end = layout.image_range(index, groups.dp_rank)
        for leaf, whole in zip((output.pooled_ND, output.context_ND), expected, strict=False):
            gradient = leaf.grad
            assert gradient is not None
            differences.append(float((gradient[: end - begin] - WEIGHT * whole[begin:end]).abs().sum()))
            differences.append(float(gradient[end - begin :].abs().sum()))  # the blank slot
    sums = torch.stack([sum(part.contrastive_loss for part in parts), outputs[0].logit_scale.grad])  # type: ignore[arg-type, list-item]
    torch.distributed.all_reduce(sums, group=groups.dp)
    differences += (
        (sums - torch.tensor([expected_loss, WEIGHT * float(expected[2])], dtype=torch.float64)).abs().tolist()
    )
    assert [part.contrast is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].contrast is not None
    assert int(parts[-1].contrast.is_pair_G.sum()) == int(pattern.is_pair.sum())
    return differences


def _on_rank(rank: int, world_size: int) -> float:
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    # max() would pass over a NaN.
    values = [np.array(_differences(make_pattern(seed), seed, groups)) for seed in range(PATTERNS)]
    return float(np.concatenate(values).max())


def test_random_patterns_equal_brute_force() -> None:
    differences = run_distributed(_on_rank, RANKS)
    assert max(differences) <= TOLERANCE
    assert not any(np.isnan(differences))


def test_patterns_hold_what_they_should() -> None:
    patterns = [make_pattern(seed) for seed in range(PATTERNS)]
    assert sum(not p.num_images.any() for p in patterns) >= PATTERNS // 10
    assert sum(p.num_images.any() and not p.is_pair.any() for p in patterns) >= 5
    assert sum((p.num_images.sum(axis=1) == 0).any() and bool(p.is_pair.any()) for p in patterns) >= PATTERNS // 20
    assert max(int(p.is_pair.sum()) for p in patterns) >= 20


def _in_bf16(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """Gradients of one micro-batch's bf16 features, contrasted directly and by way of the whole step's contrast."""
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    count, is_all = 40, np.ones(40, dtype=bool)
    layout = StepLayout(np.array([[count]]), is_all, 1, 1, 1)
    agreed = AgreedStep(0, layout, (_blank_batch(count),), is_all, False)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, count, WIDTH, generator=generator).bfloat16()
    # bfloat16 has no 0.1: it would be 0.10009765625.
    loss, found = LossConfig(contrastive_loss_weight=0.1), {}
    for name in ("direct", "by surrogate"):
        pooled, context = (part.clone().requires_grad_() for part in features)
        logit_scale = torch.tensor(2.3).requires_grad_()
        output = LCLOutput(torch.zeros(1).requires_grad_(), pooled, context, logit_scale)
        objective = Objective(loss, agreed, groups)
        if name == "by surrogate":
            objective = Objective(loss, agreed, groups, objective.contrast_of_features([output]))
        objective(0, output)[0].backward()
        found[name] = [leaf.grad for leaf in (pooled, context) if leaf.grad is not None]
    return found


def test_gradients_of_bf16_features_are_rounded_once() -> None:
    """Oracle: the contrast of the same features in one pass, bit for bit."""
    (found,) = run_distributed(_in_bf16, 1)
    assert len(found["direct"]) == len(found["by surrogate"]) == 2
    assert found["direct"][0].dtype == torch.bfloat16
    assert float(found["direct"][0].abs().max()) > 0
    for direct, by_surrogate in zip(found["direct"], found["by surrogate"], strict=True):
        assert torch.equal(by_surrogate, direct)


COUNT = 5


def _losses_without_value(rank: int, world_size: int, scope: str, spoilt: str, value: float) -> dict[str, Any]:
    """Return a micro-batch's parts and gradients, healthy and with a loss whose value alone is spoilt."""
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    layout = StepLayout(np.array([[COUNT]]), np.ones(COUNT, dtype=bool), 3, 1, 1)
    batch = dataclasses.replace(
        _blank_batch(COUNT),
        has_context=torch.ones(COUNT, dtype=torch.bool),
        image_ok=torch.ones(COUNT, dtype=torch.bool),
    )
    agreed = AgreedStep(0, layout, (batch,), np.ones(COUNT, dtype=bool), StepFlags())
    loss = LossConfig(contrastive_loss_weight=0.1, latent_regression_loss_weight=0.5)
    found: dict[str, Any] = {}
    for name in ("healthy", spoilt):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(shape, generator=generator) for shape in ((3,), (COUNT, WIDTH), (COUNT, WIDTH), (COUNT,))]
        token_losses, pooled, context, errors = (leaf.requires_grad_() for leaf in leaves)
        logit_scale = torch.tensor(2.3).requires_grad_()
        # Adding a constant changes the value and leaves the gradient.
        output = LCLOutput(
            token_losses_K=token_losses + (value if name == "generation" else 0.0),
            pooled_ND=pooled,
            context_ND=context,
            logit_scale=logit_scale,
            latent_errors_N=errors + (value if name == "regression" else 0.0),
        )
        objective = _Spoilt(loss, agreed, groups, value if name == "contrast" else 0.0)
        if scope == "global":
            whole = objective.contrast_of_features([output])
            objective = _Spoilt(loss, agreed, groups, 0.0)
            objective.contrast = whole
        total, parts = objective(0, output)
        total.backward()
        found[name] = parts, [leaf.grad for leaf in (*leaves, logit_scale)]
    return found


class _Spoilt(Objective):
    """An objective whose contrast has another value and the same gradient."""

    def __init__(self, loss: LossConfig, agreed: AgreedStep, groups: ProcessGroups, added: float) -> None:
        super().__init__(loss, agreed, groups)
        self.added = added

    def _contrast(self, *arguments: Any) -> Any:
        contrast = super()._contrast(*arguments)
        return dataclasses.replace(contrast, loss_sum=contrast.loss_sum + self.added)


@pytest.mark.parametrize("scope", ["micro_batch", "global"])
@pytest.mark.parametrize("spoilt", ["generation", "contrast", "regression"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_without_value_makes_the_whole_gradient_no_number(scope: str, spoilt: str, value: float) -> None:
    """Its own gradient is finite, as that of the healthy one is, to which the same constant was not added."""
    (found,) = run_distributed(_losses_without_value, 1, scope, spoilt, value)
    parts, gradients = found["healthy"]
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in gradients)
    names = {
        "generation": "generation_loss",
        "contrast": "contrastive_loss",
        "regression": "latent_regression_loss",
    }
    for name, field in names.items():
        assert bool(torch.isfinite(getattr(parts, field)))
        assert bool(torch.isfinite(getattr(found[spoilt][0], field))) == (name != spoilt)
    for gradient in found[spoilt][1]:
        assert bool(torch.isnan(gradient).all())
