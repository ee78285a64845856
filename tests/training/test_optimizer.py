"""Optimizer and schedule.

Oracles: torch.optim.AdamW on a copy of the parameters, with its own clipping; the closed forms of warm-up and cosine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lcl_megatron.config import RunConfig
from lcl_megatron.training.optimizer import build_scheduler
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step
from tests.training.small_runs import DataFolder, plain_document, small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataFolder(tmp_path_factory.mktemp("optimizer") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    return data.corpus


def steps(run: Run) -> Iterator[Any]:
    """Train step by step; yields what each step returns."""
    for batch in run.loader:
        yield train_step(run, batch)


def parameters(run: Run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.engine.model.named_parameters()}


@pytest.mark.parametrize("clip_grad", [0.0, 0.05])
@pytest.mark.parametrize("distributed", [True, False])
def test_updates_equal_torchs_adamw(corpus: Path, clip_grad: float, distributed: bool) -> None:
    config = small_config(
        corpus,
        optimizer={"lr": 1e-2, "lr_warmup_iters": 3, "weight_decay": 0.3, "clip_grad": clip_grad},
        parallel={"use_distributed_optimizer": distributed},
    )
    with run_from(config) as run:
        expected = {name: torch.nn.Parameter(value) for name, value in parameters(run).items()}
        decayed = [p for p in expected.values() if p.dim() > 1]
        spared = [p for p in expected.values() if p.dim() <= 1]
        settings = config.optimizer
        adamw = torch.optim.AdamW(
            [{"params": decayed}, {"params": spared, "weight_decay": 0.0}],
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            weight_decay=0.3,
        )
        results = steps(run)
        for _ in range(3):
            result = next(results)
            gradients = {name: p.main_grad.clone() for name, p in run.engine.model.named_parameters()}
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
            # With clipping, main_grad has been scaled; its norm is then the limit.
            assert min(result.grad_norm, clip_grad or math.inf) == pytest.approx(norm, rel=1e-4)
            for name, parameter in expected.items():
                parameter.grad = gradients[name]
            for group in adamw.param_groups:
                group["lr"] = result.learning_rate
            adamw.step()
            for name, parameter in run.engine.model.named_parameters():
                torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        assert {n for n, p in expected.items() if p.dim() <= 1} > {"logit_scale", "pool.query"}


def test_no_weight_decay_on_vectors(corpus: Path) -> None:
    """Read off the parameter groups that the optimizer works with, and off a step without gradient."""
    with run_from(small_config(corpus, optimizer={"weight_decay": 0.5, "lr": 1e-2, "lr_warmup_iters": 0})) as run:
        optimizer = run.trainable.optimizer
        before = parameters(run)
        run.engine.zero_gradients()
        optimizer.zero_grad()
        run.trainable.scheduler.step(1)
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        for name, value in parameters(run).items():
            factor = 1.0 if value.dim() <= 1 else 1.0 - lr * 0.5
            torch.testing.assert_close(value, before[name] * factor, rtol=1e-6, atol=0.0, msg=name)


@pytest.mark.parametrize(("warmup", "decay"), [(4, 0), (0, 0), (4, 12)])
def test_learning_rate_is_linear_then_a_cosine(corpus: Path, warmup: int, decay: int) -> None:
    lr, min_lr, iters = 2e-3, 1e-4, 20
    config = small_config(
        corpus,
        training={"train_iters": iters},
        optimizer={"lr": lr, "min_lr": min_lr, "lr_warmup_iters": warmup, "lr_decay_iters": decay},
    )
    end = decay or iters
    with run_from(config) as run:
        scheduler = build_scheduler(config, run.trainable.optimizer)
        for done in range(1, iters + 1):
            scheduler.step(1)
            found = [group["lr"] for group in run.trainable.optimizer.param_groups]
            if done <= warmup:
                expected = lr * done / warmup
            else:
                share = min(1.0, (done - warmup) / (end - warmup))
                expected = min_lr + (lr - min_lr) * (1 + math.cos(math.pi * share)) / 2
            assert found == pytest.approx([expected] * len(found), rel=1e-12), done


def test_a_step_reports_the_rate_it_used(corpus: Path) -> None:
    with run_from(small_config(corpus, optimizer={"lr": 1e-2, "lr_warmup_iters": 4})) as run:
        rates = [result.learning_rate for _, result in zip(range(5), steps(run), strict=False)]
    assert rates[:4] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert rates[4] == pytest.approx(0.5e-2 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_temperature_stays_within_its_limits(corpus: Path, precision: str) -> None:
    config = small_config(
        corpus,
        training={"precision": precision},
        optimizer={"lr": 1e-30, "lr_warmup_iters": 0},
        loss={"logit_scale_max": 3.0},
    )
    with run_from(config) as run:
        scale, results = run.engine.model.logit_scale, steps(run)
        assert scale is not None
        for value, expected in ((5.0, 3.0), (-1.0, 0.0), (2.5, 2.5)):
            with torch.no_grad():
                scale.fill_(value)
            for _ in range(2):  # a second time, in case the optimizer works on a copy of its own
                next(results)
                assert float(scale.detach()) == expected


def test_half_precision_keeps_float32_weights_and_moments(corpus: Path) -> None:
    """Updates far below bf16's resolution must not be lost: they add up in the main parameters."""
    config = small_config(
        corpus,
        training={"precision": "bf16", "train_iters": 40},
        optimizer={"lr": 2e-5, "lr_warmup_iters": 0, "weight_decay": 0.0},
    )
    with run_from(config) as run:
        model, optimizer = run.engine.model, run.trainable.optimizer
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        assert dtypes.pop("logit_scale") == torch.float32
        assert set(dtypes.values()) == {torch.bfloat16}
        main = [p for group in optimizer.param_groups for p in group["params"]]
        assert {p.dtype for p in main} == {torch.float32}
        assert {p.main_grad.dtype for p in model.parameters()} == {torch.float32}
        before = torch.cat([p.detach().flatten() for p in main])
        for _ in steps(run):
            pass
        moved = (torch.cat([p.detach().flatten() for p in main]) - before).abs()
        state = [
            value
            for s in optimizer.chained_optimizers[0].optimizer.state.values()
            for value in s.values()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        ]
        assert {value.dtype for value in state} == {torch.float32}
    # bf16 has 8 bits: a weight of 0.1 moves by 4e-4 or not at all; one update is at most 2e-5.
    assert 0 < float(moved[moved > 0].min()) < 1e-4
    assert float(moved.median()) > 2e-5


def test_unknown_settings_of_megatron_core_would_be_seen(corpus: Path, tmp_path: Path) -> None:
    """What the optimizer was built with is what the configuration says."""
    config: RunConfig = small_config(
        corpus,
        optimizer={"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_eps": 1e-5, "clip_grad": 0.7, "weight_decay": 0.03},
    )
    with run_from(config) as run:
        for group in run.trainable.optimizer.param_groups:
            assert group["betas"] == (0.8, 0.95)
            assert group["eps"] == 1e-5
        assert run.trainable.optimizer.config.clip_grad == 0.7
        assert {group["weight_decay"] for group in run.trainable.optimizer.param_groups} == {0.0, 0.03}
