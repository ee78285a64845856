"""One optimizer step: agree, forward and backward through the pipeline, update."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel.agreement import AgreedStep, Word, agree
from lcl_megatron.training.objective import LossOutput, losses_and_gradients
from lcl_megatron.training.run import Run


class NonFiniteError(RuntimeError):
    """A step whose gradient is infinite or no number: the weights are lost."""


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


def train_step(run: Run, batch: StepBatch) -> StepResult:
    """Run one optimizer step; collective over all ranks.

    Raises:
        NonFiniteError: the gradient norm is not finite, on all ranks alike.
    """
    engine, optimizer = run.engine, run.trainable.optimizer
    run.watchdog.mark("agree")
    agreed = agree(batch, engine.groups, Word(stop=run.stop.requested))
    run.watchdog.mark("forward_backward")
    engine.zero_gradients()
    optimizer.zero_grad()
    losses = losses_and_gradients(engine, agreed)
    run.watchdog.mark("optimizer")
    # The rate of step k is lr * (k + 1) / warm-up: no step is spent at rate 0.
    run.trainable.scheduler.step(1)
    _, grad_norm, _ = optimizer.step()
    if not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"step {batch.step + 1}: the gradient norm is {grad_norm}. Go on from the last checkpoint with a lower "
            "--lr or --clip-grad, or a longer --lr-warmup-iters"
        )
    engine.clamp_logit_scale()
    return StepResult(agreed, losses, float(grad_norm), optimizer.param_groups[0]["lr"])
