"""One optimizer step: agree, forward and backward through the pipeline, judge the gradient, update."""

from __future__ import annotations

from dataclasses import dataclass

from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel.agreement import AgreedStep, agree
from lcl_megatron.parallel.gradient_norm import clip_and_update, gradient_norm
from lcl_megatron.parallel.parameter_hash import ranks_of_lost_weights
from lcl_megatron.training.guard import Skip
from lcl_megatron.training.objective import LossOutput, losses_and_gradients
from lcl_megatron.training.run import Run
from lcl_megatron.training.skipped_steps import report_skip


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that is infinite, no number, or far out of line; or weights are lost."""


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
    skip: Skip | None = None
    """Why it changed no weight on any rank; None = it was taken."""


def train_step(run: Run, batch: StepBatch) -> StepResult:
    """Run one optimizer step; collective over all ranks.

    A step that ``run.guard`` objects to leaves weights, moments and Adam's step as they are, on all ranks. It counts as
    a step: its rows are consumed, and the learning rate stays a function of the step's number.

    Raises:
        NonFiniteError: too many steps in a row were skipped, or the weights are the reason; on all ranks alike.
    """
    engine, optimizer = run.engine, run.trainable.optimizer
    run.watchdog.mark("agree")
    agreed = agree(batch, engine.groups, run.flags())
    run.watchdog.mark("forward_backward")
    engine.zero_gradients()
    optimizer.zero_grad()
    losses = losses_and_gradients(engine, agreed)
    run.watchdog.mark("optimizer")
    # The rate of step k is lr * (k + 1) / warm-up: no step is spent at rate 0.
    run.trainable.scheduler.step(1)
    optimizer.prepare_grads()
    grad_norm = gradient_norm(optimizer, engine.device)
    skip = run.guard.judge(batch.step + 1, grad_norm)
    if skip is None:
        clip_and_update(optimizer, grad_norm, engine.config.optimizer.clip_grad)
        engine.clamp_logit_scale()
    else:
        report_skip(run, skip)
        _stop_if_hopeless(run, skip)
    return StepResult(agreed, losses, grad_norm, optimizer.param_groups[0]["lr"], skip)


def _stop_if_hopeless(run: Run, skip: Skip) -> None:
    """End the run where skipping does not help, before anything is saved; collective over all ranks."""
    if lost := ranks_of_lost_weights(run.engine):
        raise NonFiniteError(
            f"{skip}, and the weights of {', '.join(lost)} are not finite themselves: no later step can be taken. Go "
            "on from the last checkpoint; where only some replicas are named, their nodes are at fault: drain those"
        )
    if not run.guard.is_exhausted:
        return
    guard = run.guard
    count = len(guard.in_a_row)
    row = f": {count} skipped steps in a row" if count > 1 else ""
    healthy = "; if these norms are healthy, raise --spike-threshold" if guard.config.spike_threshold else ""
    raise NonFiniteError(
        f"{guard.describe_row()}{row}, and guard.max_skipped_steps = {guard.config.max_skipped_steps}. Go on from the "
        "last checkpoint with a lower --lr or --clip-grad, or a longer --lr-warmup-iters; tools/replay_step.py shows "
        f"which rows of a step are at fault{healthy}"
    )
