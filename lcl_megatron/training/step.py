"""One optimizer step: agree, forward and backward through the pipeline, update.

    L = w_gen * sum(token losses) / targets + w_con * sum(pair losses) / pairs + w_reg * sum(latent errors) / pairs

All sums and counts are over the *global* batch: all data-parallel ranks, all micro-batches. Each micro-batch
divides by the global counts, gradients are summed, and so loss and gradient do not depend on the layout.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor

from lcl_megatron.config import LossConfig
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.model.lcl import LCLOutput
from lcl_megatron.parallel.agreement import AgreedStep, agree
from lcl_megatron.parallel.contrastive import ContrastiveOutput, contrastive_loss
from lcl_megatron.parallel.groups import ProcessGroups
from lcl_megatron.parallel.report import sum_over_context_parallel
from lcl_megatron.training.run import Run


class NonFiniteError(RuntimeError):
    """A step whose gradient is infinite or no number: the weights are lost."""


@dataclass(frozen=True)
class LossOutput:
    """One micro-batch's share of the losses on one data-parallel rank, detached; alike on its tp and cp ranks."""

    generation_loss: Tensor
    """Scalar: this share of the global mean over targets."""
    contrastive_loss: Tensor
    """Scalar: this share of the global mean over pairs."""
    contrast: ContrastiveOutput
    """Retrieval hits and features."""
    logit_scale: Tensor
    """Scalar, log of the inverse temperature."""
    latent_regression_loss: Tensor | None = None
    """Scalar: this share of the global mean over pairs; None while the regression is off."""


@dataclass(frozen=True)
class StepResult:
    """What a step tells the loop."""

    agreed: AgreedStep
    """The step that was run."""
    losses: list[LossOutput]
    """One per micro-batch on the last stage; empty elsewhere."""
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """Rate this step used."""


class Objective:
    """The loss of each micro-batch of one step.

    Parallel: features are gathered over dp; every tensor-parallel rank computes the same. Every context-parallel rank
    differentiates its own share of the next-token loss and all of the contrastive loss (see ``LCLOutput``).
    """

    def __init__(self, loss: LossConfig, agreed: AgreedStep, groups: ProcessGroups) -> None:
        self.loss = loss
        self.agreed = agreed
        self.groups = groups

    def __call__(self, micro_batch: int, output: LCLOutput) -> tuple[Tensor, LossOutput]:
        """Return the loss to differentiate and its parts.

        Negatives of a pair are the pairs of the same micro-batch index on all data-parallel ranks
        (``contrastive_scope = micro_batch``).
        """
        generation = output.token_losses_K.sum() / max(1, self.agreed.layout.num_targets)
        contrast = contrastive_loss(
            output.pooled_ND,
            output.context_ND,
            output.logit_scale,
            self.agreed.pair_slots(micro_batch),
            self.groups.dp,
            self.loss.contrastive_tile_size,
        )
        contrastive = contrast.loss_sum / max(1, self.agreed.num_pairs)
        total = self.loss.generation_loss_weight * generation + self.loss.contrastive_loss_weight * contrastive
        whole_generation = sum_over_context_parallel(generation, self.groups)
        parts = LossOutput(whole_generation, contrastive.detach(), contrast, output.logit_scale.detach())
        if output.latent_errors_N is None:
            return total, parts
        regression = self._latent_regression(micro_batch, output.latent_errors_N)
        total = total + self.loss.latent_regression_loss_weight * regression
        return total, dataclasses.replace(parts, latent_regression_loss=regression.detach())

    def _latent_regression(self, micro_batch: int, errors_N: Tensor) -> Tensor:
        """Return this micro-batch's share of the mean error over the images that are contrasted."""
        is_pair_N = self.agreed.micro_batches[micro_batch].pair_mask.to(errors_N.device)
        return errors_N.masked_fill(~is_pair_N, 0.0).sum() / max(1, self.agreed.num_pairs)


def train_step(run: Run, batch: StepBatch) -> StepResult:
    """Run one optimizer step; collective over all ranks.

    Raises:
        NonFiniteError: the gradient norm is not finite, on all ranks alike.
    """
    engine, optimizer = run.engine, run.trainable.optimizer
    agreed = agree(batch, engine.groups, run.stop.requested)
    engine.ddp.zero_grad_buffer()
    optimizer.zero_grad()
    objective = Objective(run.config.loss, agreed, engine.groups)
    losses = engine.forward_backward(agreed.micro_batches, objective, batch.step)
    # The rate of step k is lr * (k + 1) / warm-up: no step is spent at rate 0.
    run.trainable.scheduler.step(1)
    _, grad_norm, _ = optimizer.step()
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"step {batch.step + 1}: the gradient norm is {grad_norm}. Go on from the last checkpoint with a lower "
            "--lr or --clip-grad, or a longer --lr-warmup-iters"
        )
    engine.model.clamp_logit_scale()
    return StepResult(agreed, losses, float(grad_norm), optimizer.param_groups[0]["lr"])
