"""The training loop of transfer tasks.

Oracles: torch's AdamW called by hand on whole batches; one process against two; a fit without interruption.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.transfer.fit import (
    Curve,
    DivergenceError,
    Draw,
    FitConfig,
    LossSum,
    NothingToLearnError,
    PreparedLoss,
    draw,
    fit,
    learning_rate_factor,
)
from lcl_megatron.parallel.replicas import Replicas
from tests.parallel.test_replicas import ALONE, on_ranks

RANDOM = torch.Generator().manual_seed(0)
INPUTS, TARGETS = torch.randn(30, 4, generator=RANDOM), torch.randn(30, 2, generator=RANDOM)
CONFIG = FitConfig(steps=7, batch_size=8, lr=0.05, weight_decay=0.1, warmup_steps=2, log_interval=3)


def new_module(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def loss_of(module: nn.Module) -> Any:
    def loss(part: Draw) -> LossSum:
        errors = (module(INPUTS[part.indices]) - TARGETS[part.indices]).square()
        return LossSum(errors.sum(), errors.numel())

    return loss


def run(config: FitConfig, replicas: Replicas = ALONE, **options: Any) -> tuple[list[Tensor], Curve]:
    module = new_module()
    curve = fit(module, loss_of(module), len(INPUTS), config, replicas, **options)
    return [parameter.detach() for parameter in module.parameters()], curve


def test_fit_equals_adamw_by_hand() -> None:
    module = new_module()
    decayed = [p for p in module.parameters() if p.ndim > 1]
    spared = [p for p in module.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": spared, "weight_decay": 0.0}], weight_decay=0.1)
    losses = []
    for step in range(7):
        lr = 0.05 * ((step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 5)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        indices = draw(30, 8, 3, step).indices
        loss = F.mse_loss(module(INPUTS[indices]), TARGETS[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    weights, curve = run(CONFIG, seed=3)
    torch.testing.assert_close(weights, [p.detach() for p in module.parameters()], rtol=1e-5, atol=1e-6)
    assert curve.steps == (3, 6, 7)
    expected = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    np.testing.assert_allclose(curve.losses, expected, rtol=1e-5)
    assert curve.lrs[-1] == pytest.approx(lr)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_micro_batches_do_not_change_the_result(micro_batch_size: int) -> None:
    whole, curve = run(CONFIG)
    parts, other = run(dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other.losses, curve.losses, rtol=1e-5)


def test_two_ranks_do_what_one_does() -> None:
    whole, curve = run(CONFIG)

    def on_rank(replicas: Replicas) -> Any:
        config = dataclasses.replace(CONFIG, micro_batch_size=3)
        return run(config, replicas)

    for weights, found in on_ranks(on_rank):
        torch.testing.assert_close(weights, whole, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.losses, curve.losses, rtol=1e-5)


def test_ranks_begin_with_the_first_one_s_weights() -> None:
    def on_rank(replicas: Replicas) -> Any:
        module = new_module(seed=replicas.rank)
        fit(module, loss_of(module), 30, CONFIG, replicas)
        return [parameter.detach() for parameter in module.parameters()]

    first, second = on_ranks(on_rank)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, run(CONFIG)[0], rtol=1e-5, atol=1e-6)


def test_reading_ahead_gives_each_part_its_own_data() -> None:
    module = new_module()
    loss = loss_of(module)

    def compute(part: Draw, prepared: np.ndarray) -> LossSum:
        assert np.array_equal(prepared, part.keys)
        return loss(part)

    prepared = PreparedLoss(lambda part: part.keys, compute)
    fit(module, prepared, 30, dataclasses.replace(CONFIG, micro_batch_size=3), ALONE)
    found = [parameter.detach() for parameter in module.parameters()]
    torch.testing.assert_close(found, run(CONFIG)[0], rtol=1e-5, atol=1e-6)
    assert float(prepared(draw(30, 4, 0, 0)).weight) == 8


def test_errors_while_reading_ahead_end_the_fit() -> None:
    def prepare(part: Draw) -> None:
        raise OSError(f"step {part.step} cannot be read")

    module = new_module()
    with pytest.raises(OSError, match="step 0 cannot be read"):
        fit(module, PreparedLoss(prepare, lambda part, _: loss_of(module)(part)), 30, CONFIG, ALONE)


def test_order_goes_through_epochs_and_depends_on_the_seed() -> None:
    keys = np.concatenate([draw(10, 4, 1, step).keys for step in range(5)])
    indices = np.concatenate([draw(10, 4, 1, step).indices for step in range(5)])
    assert keys.tolist() == list(range(20))
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10].tolist() != indices[10:].tolist()
    assert indices.tolist() != np.concatenate([draw(10, 4, 2, step).indices for step in range(5)]).tolist()


def test_learning_rate_warms_up_and_falls() -> None:
    config = FitConfig(steps=10, batch_size=1, lr=1.0, warmup_steps=4)
    factors = [learning_rate_factor(config, step) for step in range(10)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[7] == pytest.approx(0.5)
    assert factors[9] < 0.07


def test_pretrained_parameters_have_their_own_learning_rate() -> None:
    module = new_module()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    config = dataclasses.replace(CONFIG, pretrained_lr=1e-12, weight_decay=0.0)
    fit(module, loss_of(module), 30, config, ALONE, pretrained=module[0].parameters())
    moved = [float((new.detach() - old).abs().max()) for new, old in zip(module.parameters(), before, strict=True)]
    assert max(moved[:2]) < 1e-6 < 1e-2 < min(moved[2:])


def test_parameters_without_gradient_stay() -> None:
    module = new_module()
    module[0].requires_grad_(False)
    before = module[0].weight.clone()
    fit(module, loss_of(module), 30, CONFIG, ALONE)
    assert torch.equal(module[0].weight, before)


def test_gradients_are_clipped_to_their_norm() -> None:
    norms = []
    for clip in (0.0, 0.01):
        module = new_module()
        config = FitConfig(steps=1, batch_size=8, lr=1e-9, grad_clip=clip)
        fit(module, loss_of(module), 30, config, ALONE)
        norms.append(float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm()))  # type: ignore[union-attr]
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_bf16_keeps_weights_in_float32() -> None:
    weights, curve = run(dataclasses.replace(CONFIG, precision="bf16"))
    assert all(weight.dtype == torch.float32 for weight in weights)
    # bfloat16 has 8 bits; the losses are near 1.
    np.testing.assert_allclose(curve.losses, run(CONFIG)[1].losses, rtol=0.05)
    assert curve.losses != run(CONFIG)[1].losses


class Interrupted(Exception):
    pass


def test_an_interrupted_fit_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, save_interval=2)
    state = tmp_path / "states" / "a.pt"

    def dropping(module: nn.Module, stop_at: int) -> Any:
        def loss(part: Draw) -> LossSum:
            if part.step == stop_at:
                raise Interrupted
            hidden = F.dropout(module(INPUTS[part.indices]), 0.3)
            return LossSum((hidden - TARGETS[part.indices]).square().sum(), len(part.indices))

        return loss

    whole = new_module()
    curve = fit(whole, dropping(whole, -1), 30, config, ALONE)
    broken = new_module()
    with pytest.raises(Interrupted):
        fit(broken, dropping(broken, 5), 30, config, ALONE, state_file=state)
    resumed = new_module(seed=9)
    assert fit(resumed, dropping(resumed, -1), 30, config, ALONE, state_file=state) == curve
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)

    again = new_module(seed=8)
    assert fit(again, dropping(again, 0), 30, config, ALONE, state_file=state) == curve  # no step is taken
    assert torch.equal(again[0].weight, whole[0].weight)

    with pytest.raises(OSError, match=r"a\.pt belongs to a fit with other settings; delete it"):
        fit(new_module(), dropping(whole, -1), 30, dataclasses.replace(config, lr=1.0), ALONE, state_file=state)
    state.write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"a\.pt is no saved state of a fit \(\w+\); delete it to begin again"):
        fit(new_module(), dropping(whole, -1), 30, config, ALONE, state_file=state)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    module = new_module()

    def loss(part: Draw) -> LossSum:
        total, weight = loss_of(module)(part)
        return LossSum(total * (math.nan if part.step == 2 else 1), weight)

    with pytest.raises(DivergenceError, match=r"the loss of step 3 of 7 is nan; lower fit.lr = 0\.05"):
        fit(module, loss, 30, CONFIG, ALONE)


def test_a_last_gradient_that_is_not_finite_is_an_error() -> None:
    """Its loss is finite, and there is no other loss behind it."""
    module = new_module()

    def loss(part: Draw) -> LossSum:
        total, weight = loss_of(module)(part)
        return LossSum(total + (0.0 * total).sqrt() if part.step == CONFIG.steps - 1 else total, weight)

    with pytest.raises(DivergenceError, match=r"4 parameters are not finite after the last step, e\.g\. 0\.weight"):
        fit(module, loss, 30, CONFIG, ALONE)


def test_a_step_without_anything_to_learn_is_an_error() -> None:
    module = new_module()

    def loss(part: Draw) -> LossSum:
        return LossSum(0.0 * module(INPUTS[part.indices]).sum(), 8.0 * (part.step < 2))

    with pytest.raises(NothingToLearnError, match="step 3 of 7 has nothing to learn from in its 8 examples"):
        fit(module, loss, 30, CONFIG, ALONE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "fit.steps = 0; expected at least 1"),
        ({"batch_size": 0}, "fit.batch_size = 0; expected at least 1"),
        ({"warmup_steps": 8}, "fit.warmup_steps = 8 of fit.steps = 7; warm-up is part of the steps: set fewer"),
        ({"grad_clip": -1.0}, "fit.grad_clip = -1.0; expected 0 or more"),
        ({"lr": 0.0}, "fit.lr = 0.0; expected more than 0"),
    ],
)
def test_wrong_settings_are_explained(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_what_cannot_be_fitted_is_explained() -> None:
    module = new_module()
    with pytest.raises(ConfigError, match="the training set is empty"):
        fit(module, loss_of(module), 0, CONFIG, ALONE)
    with pytest.raises(ConfigError, match="fit.batch_size = 8 cannot be shared evenly by 3 processes"):
        fit(module, loss_of(module), 30, CONFIG, Replicas(0, 3, torch.device("cpu"), None))
    with pytest.raises(ConfigError, match="no parameter requires a gradient"):
        fit(module.requires_grad_(False), loss_of(module), 30, CONFIG, ALONE)
