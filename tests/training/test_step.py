"""One optimizer step.

Oracles: torch's own cross-entropy and a brute-force InfoNCE on features of the whole global batch in one graph, with
autograd; a run whose loader hands over the same rows.
"""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.config import LossConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel.agreement import agree
from lcl_megatron.training.objective import Objective
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from lcl_megatron.training.step import train_step
from tests.training.small_runs import DataFolder, plain_document, small_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents with one, two or no contrastive pair; some images are truncated."""
    data = DataFolder(tmp_path_factory.mktemp("step") / "data")
    data.write([plain_document(number) for number in range(12)])
    data.truncate("2b.png")
    data.preprocess()
    return data.corpus


def plain_losses(run: Run, batch: StepBatch) -> tuple[Tensor, Tensor]:
    """Generation loss per target and contrastive loss per pair, from their definitions, over all micro-batches."""
    token_losses, pair_losses = [], []
    for micro in batch.micro_batches:
        output = run.engine.model(micro, None, batch.step)
        logits = run.engine.model.target_logits(micro)
        token_losses.append(F.cross_entropy(logits, micro.labels.flatten()[micro.label_positions], reduction="none"))
        is_pair = micro.has_context & micro.image_ok
        images = F.normalize(output.pooled_ND[is_pair], dim=-1)
        contexts = F.normalize(output.context_ND[is_pair], dim=-1)
        scores = output.logit_scale.exp() * images @ contexts.T
        own = torch.arange(len(scores))
        pair_losses.append(
            (F.cross_entropy(scores, own, reduction="none") + F.cross_entropy(scores.T, own, reduction="none")) / 2
        )
    return torch.cat(token_losses).mean(), torch.cat(pair_losses).mean()


@pytest.mark.parametrize("micro_batch_size", [2, 4])
@pytest.mark.parametrize("weights", [(1.0, 0.1), (0.0, 1.0), (1.0, 0.0)])
def test_losses_and_gradient_are_the_definitions(
    corpus: Path, micro_batch_size: int, weights: tuple[float, float]
) -> None:
    config = small_config(
        corpus,
        training={"micro_batch_size": micro_batch_size},
        loss={
            "generation_loss_weight": weights[0],
            "contrastive_loss_weight": weights[1],
            "contrastive_tile_size": 3,
            "cross_entropy_chunk_size": 7,
        },
        # A rate of nothing, so that the step leaves its gradient to look at.
        optimizer={"lr": 1e-30, "clip_grad": 0.0, "weight_decay": 0.0},
    )
    with run_from(config) as run:
        batch = next(b for b in run.loader if b.bad_images)
        generation, contrastive = plain_losses(run, batch)
        (weights[0] * generation + weights[1] * contrastive).backward()
        # megatron-core's hooks move gradients to ``main_grad``.
        expected = {name: p.main_grad.clone() for name, p in run.engine.model.named_parameters()}
        result = train_step(run, batch)
        found = {name: p.main_grad.clone() for name, p in run.engine.model.named_parameters()}
    assert len(result.losses) == 4 // micro_batch_size
    assert sum(float(part.generation_loss) for part in result.losses) == pytest.approx(float(generation), rel=1e-5)
    assert sum(float(part.contrastive_loss) for part in result.losses) == pytest.approx(float(contrastive), rel=1e-5)
    largest = max(float(g.norm()) for g in expected.values())
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize("micro_batch_size", [2, 4])
def test_latent_regression_compares_each_latent_with_the_output_before_it(corpus: Path, micro_batch_size: int) -> None:
    """Loss and gradient against a loop over images and latents, on what the embedding puts into the rows."""
    config = small_config(
        corpus,
        training={"micro_batch_size": micro_batch_size},
        loss={"generation_loss_weight": 0.0, "contrastive_loss_weight": 0.0, "latent_regression_loss_weight": 0.5},
        optimizer={"lr": 1e-30, "clip_grad": 0.0, "weight_decay": 0.0},
    )
    with run_from(config) as run:
        batch = next(b for b in run.loader if b.bad_images)
        model: Any = run.engine.model
        errors = []
        for micro in batch.micro_batches:
            latents, _ = model.pool(model.vision(micro.images))
            hidden = model.language.decode(model.language.embed(micro, latents), micro)[:, 0]
            for image in (micro.has_context & micro.image_ok).nonzero()[:, 0].tolist():
                for number, latent in enumerate(latents[image]):
                    before = hidden[int(micro.image_slots[image]) + number - 1]
                    predicted = model.language.heads.context_features(before[None])[0]
                    errors.append(F.mse_loss(predicted, latent))
        expected_loss = torch.stack(errors).mean()
        # megatron-core waits for a gradient of every parameter, so the other losses take part, with weight 0.
        (0.5 * expected_loss + 0.0 * sum(plain_losses(run, batch))).backward()
        expected = {name: p.main_grad.clone() for name, p in model.named_parameters()}
        result = train_step(run, batch)
        found = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    regression = sum(float(part.latent_regression_loss) for part in result.losses)  # type: ignore[arg-type]
    assert regression == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    largest = max(float(g.norm()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6 * largest, name
    assert float(expected["vision.embedding.weight"].norm()) > 0


def test_without_latent_regression_nothing_of_it_is_computed(corpus: Path) -> None:
    with run_from(small_config(corpus)) as run:
        batch = next(iter(run.loader))
        output: Any = run.engine.model(batch.micro_batches[0], None, 0)
        assert output.latent_errors_N is None
        assert train_step(run, batch).losses[0].latent_regression_loss is None


def test_hits_are_those_of_a_search(corpus: Path) -> None:
    with run_from(small_config(corpus)) as run:
        batch = next(iter(run.loader))
        result = train_step(run, batch)
    contrast = result.losses[0].contrast
    images, contexts = contrast.images_GD[contrast.is_pair_G], contrast.contexts_GD[contrast.is_pair_G]
    assert len(images) == result.agreed.num_pairs > 3
    scores = images @ contexts.T
    own = torch.arange(len(images))
    assert float(contrast.image_hits) == int((scores.argmax(dim=1) == own).sum())
    assert float(contrast.context_hits) == int((scores.argmax(dim=0) == own).sum())


def test_a_step_does_not_see_the_gradient_of_the_one_before(corpus: Path) -> None:
    """The same batch twice at a rate of nothing gives the same gradient twice."""
    with run_from(small_config(corpus, optimizer={"lr": 1e-30})) as run:
        batch = next(iter(run.loader))
        norms = [train_step(run, batch).grad_norm for _ in range(3)]
    assert norms == [norms[0]] * 3


def test_steps_are_reproducible(corpus: Path) -> None:
    def weights() -> dict[str, Tensor]:
        with run_from(small_config(corpus, vision={"drop_path_rate": 0.3})) as run:
            for batch in run.loader:
                train_step(run, batch)
            return {name: p.detach().clone() for name, p in run.engine.model.named_parameters()}

    first, second = weights(), weights()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("weights", [(1.0, 0.1), (0.5, 2.0)])
def test_the_loss_to_differentiate_is_the_weighted_sum(corpus: Path, weights: tuple[float, float]) -> None:
    with run_from(small_config(corpus)) as run:
        batch = next(iter(run.loader))
        agreed = agree(batch, run.engine.groups)
        output: Any = run.engine.model(agreed.micro_batches[0], None, 0)
        loss = LossConfig(generation_loss_weight=weights[0], contrastive_loss_weight=weights[1])
        total, parts = Objective(loss, agreed, run.engine.groups)(0, output)
    expected = weights[0] * parts.generation_loss + weights[1] * parts.contrastive_loss
    torch.testing.assert_close(total.detach(), expected)
    assert not parts.generation_loss.requires_grad


def test_a_request_to_stop_travels_with_the_step(corpus: Path) -> None:
    with run_from(small_config(corpus)) as run:
        batches = iter(run.loader)
        assert not train_step(run, next(batches)).agreed.flags.stop
        run.stop.begin()
        signal.raise_signal(signal.SIGTERM)
        assert train_step(run, next(batches)).agreed.flags.stop


def test_drop_path_of_a_step_depends_on_the_step(corpus: Path) -> None:
    with run_from(small_config(corpus, vision={"drop_path_rate": 0.5}, optimizer={"lr": 1e-30})) as run:
        batch = next(iter(run.loader))
        losses = [
            float(train_step(run, dataclasses.replace(batch, step=step)).losses[0].contrastive_loss)
            for step in (0, 1, 0)
        ]
    assert losses[0] == losses[2] != losses[1]


def test_kept_graphs_add_up_gradients_in_float32(corpus: Path) -> None:
    """Oracle: two passes, which compute each micro-batch's gradient in bf16 from the same features, bit for bit."""
    found = []
    for keep_graphs in (False, True):
        loss = {"contrastive_scope": "global", "contrastive_keep_graphs": keep_graphs}
        training = {"precision": "bf16", "micro_batch_size": 1}
        with run_from(small_config(corpus, loss=loss, training=training, optimizer={"lr": 1e-30})) as run:
            train_step(run, next(iter(run.loader)))
            found.append({name: p.main_grad.clone() for name, p in run.engine.model.named_parameters()})
    assert {gradient.dtype for gradient in found[1].values()} == {torch.float32}
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_the_temperature_of_a_report_is_that_of_the_loss(corpus: Path) -> None:
    """And not what the optimizer makes of it, which ranks that gather parameters late do not know yet."""
    with run_from(small_config(corpus, optimizer={"lr": 0.1})) as run:
        parameter = run.engine.model.logit_scale
        before = float(parameter.detach()[0])
        result = train_step(run, next(iter(run.loader)))
        assert float(parameter.detach()[0]) != pytest.approx(before, abs=1e-3)
    assert float(result.losses[-1].logit_scale) == before
