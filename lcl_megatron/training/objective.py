"""What a step minimises, and the passes through the model that its gradient takes.

    L = w_gen * sum(token losses) / targets + w_con * sum(pair losses) / pairs + w_reg * sum(latent errors) / pairs

All sums and counts are over the *global* batch: all data-parallel ranks, all micro-batches. Each micro-batch
divides by the global counts, gradients are summed, and so loss and gradient do not depend on the layout.

Which pairs are contrasted with each other is ``contrastive_scope``:

| scope | passes |
|---|---|
| ``micro_batch``; one micro-batch; no weight | forward and backward of each micro-batch |
| ``global`` | 1. forward of all micro-batches, without a graph; 2. one contrast of all features x, y; 3. forward and |
|  | backward of each micro-batch with <dL/dx, x> + <dL/dy, y>, which has the contrast's gradient if not its value |
| ``global``, ``contrastive_keep_graphs`` | forward of all micro-batches, one contrast, backward of each |

The two forward passes of ``global`` give the same features: there is no dropout, and drop-path is a hash of step and
image. Cached gradients of a contrastive loss: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup" (arXiv:2101.06983).

A reported loss that is not finite makes the gradient NaN, whatever its own gradient would be, so that all ranks skip
the step together (``training/step.py``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcl_megatron.config import LossConfig
from lcl_megatron.model.lcl import LCLOutput
from lcl_megatron.parallel.agreement import AgreedStep
from lcl_megatron.parallel.contrastive import ContrastiveOutput, SlotIdentity, contrastive_loss
from lcl_megatron.parallel.engine import Engine
from lcl_megatron.parallel.groups import ProcessGroups
from lcl_megatron.parallel.report import sum_over_context_parallel


@dataclass(frozen=True)
class LossOutput:
    """One micro-batch's share of the losses on one data-parallel rank, detached; alike on its tp and cp ranks."""

    generation_loss: Tensor
    """Scalar: this share of the global mean over targets."""
    contrastive_loss: Tensor
    """Scalar: this share of the global mean over pairs."""
    contrast: ContrastiveOutput | None
    """Retrieval hits and features. Where all micro-batches are contrasted at once, the last one reports for all."""
    logit_scale: Tensor
    """Scalar, log of the inverse temperature that the step's contrast used."""
    latent_regression_loss: Tensor | None = None
    """Scalar: this share of the global mean over pairs; None while the regression is off."""


@dataclass(frozen=True)
class GlobalContrast:
    """The contrast of all pairs of the global batch, and its derivatives by this rank's features."""

    output: ContrastiveOutput
    """This rank's share of the loss, hits and features."""
    pooled_gradients: tuple[Tensor, ...]
    """For each micro-batch, (N, D): derivative of the mean over all pairs by the pooled latents."""
    context_gradients: tuple[Tensor, ...]
    """The same by the context features."""
    logit_scale_gradient: Tensor
    """Scalar: this rank's share of the derivative by ``logit_scale``."""

    def surrogate(self, micro_batch: int, output: LCLOutput) -> Tensor:
        """Return a scalar whose gradient by the model's output is that of the contrastive loss.

        Its value means nothing. The temperature's gradient comes with micro-batch 0.
        """
        gradients = self.pooled_gradients[micro_batch], self.context_gradients[micro_batch]
        features = output.pooled_ND, output.context_ND
        terms = [(gradient * feature.to(gradient)).sum() for gradient, feature in zip(gradients, features, strict=True)]
        factor = self.logit_scale_gradient if micro_batch == 0 else torch.zeros_like(self.logit_scale_gradient)
        return terms[0] + terms[1] + factor * output.logit_scale


class Objective:
    """The loss of each micro-batch of one step.

    Parallel: features are gathered over dp; every tensor-parallel rank computes the same. Every context-parallel rank
    differentiates its own share of the next-token loss and all of the contrastive loss (see ``LCLOutput``).
    """

    def __init__(
        self, loss: LossConfig, agreed: AgreedStep, groups: ProcessGroups, contrast: GlobalContrast | None = None
    ) -> None:
        """Make the objective of a step.

        Args:
            loss: weights.
            agreed: the step.
            groups: process groups.
            contrast: the contrast of the whole step, of which each micro-batch feels its part; None = the pairs of one
                micro-batch index on all data-parallel ranks are contrasted with each other.
        """
        self.loss = loss
        self.agreed = agreed
        self.groups = groups
        self.contrast = contrast

    def __call__(self, micro_batch: int, output: LCLOutput) -> tuple[Tensor, LossOutput]:
        """Return the loss to differentiate, NaN unless all its parts are finite, and its parts."""
        if self.contrast is None:
            contrast = self._contrast([output], [micro_batch])
            contrastive = self._mean_over_pairs(contrast)
            return self._weighted(output, micro_batch, contrastive, contrastive, contrast)
        surrogate = self.contrast.surrogate(micro_batch, output)
        is_last = micro_batch == len(self.agreed.micro_batches) - 1
        reported = self.contrast.output if is_last else None
        value = self._mean_over_pairs(self.contrast.output) if is_last else torch.zeros_like(surrogate)
        return self._weighted(output, micro_batch, surrogate, value, reported)

    def contrast_of_features(self, features: Sequence[LCLOutput]) -> GlobalContrast:
        """Contrast all pairs of the step.

        Args:
            features: for each micro-batch, pooled latents, context features and temperature.

        Returns:
            The loss and its derivatives by the features of this rank, which need no graph of the model.

        Parallel: collective over dp.
        """
        leaves = [
            dataclasses.replace(output, pooled_ND=_leaf(output.pooled_ND), context_ND=_leaf(output.context_ND))
            for output in features
        ]
        logit_scale = features[0].logit_scale.detach().requires_grad_()
        leaves[0] = dataclasses.replace(leaves[0], logit_scale=logit_scale)
        with torch.enable_grad():
            contrast = self._contrast(leaves, range(len(leaves)))
            mean = self._mean_over_pairs(contrast)
        pooled, contexts = [leaf.pooled_ND for leaf in leaves], [leaf.context_ND for leaf in leaves]
        gradients = torch.autograd.grad(mean, [*pooled, *contexts, logit_scale])
        count = len(leaves)
        return GlobalContrast(
            output=dataclasses.replace(contrast, loss_sum=contrast.loss_sum.detach()),
            pooled_gradients=gradients[:count],
            context_gradients=gradients[count : 2 * count],
            logit_scale_gradient=gradients[-1],
        )

    def _contrast(self, outputs: Sequence[LCLOutput], micro_batches: Sequence[int]) -> ContrastiveOutput:
        """Contrast the pairs of some micro-batches with each other."""
        return contrastive_loss(
            torch.cat([output.pooled_ND for output in outputs]),
            torch.cat([output.context_ND for output in outputs]),
            outputs[0].logit_scale,
            self.agreed.pair_slots(micro_batches),
            self.groups.dp,
            self.loss.contrastive_tile_size,
            SlotIdentity.of([self.agreed.micro_batches[index] for index in micro_batches], self.loss),
        )

    def _mean_over_pairs(self, contrast: ContrastiveOutput) -> Tensor:
        """Return this rank's share of the mean over all pairs of the global batch."""
        return contrast.loss_sum / max(1, self.agreed.num_pairs)

    def _weighted(
        self,
        output: LCLOutput,
        micro_batch: int,
        contrastive: Tensor,
        reported: Tensor,
        contrast: ContrastiveOutput | None,
    ) -> tuple[Tensor, LossOutput]:
        """Add up a micro-batch's losses.

        Args:
            output: what the model gave.
            micro_batch: its index.
            contrastive: what is differentiated for the contrastive loss.
            reported: this share of the contrastive loss.
            contrast: what there is to report of the contrast.
        """
        generation = output.token_losses_K.sum() / max(1, self.agreed.layout.num_targets)
        total = self.loss.generation_loss_weight * generation + self.loss.contrastive_loss_weight * contrastive
        whole_generation = sum_over_context_parallel(generation, self.groups)
        # A copy: the parameter changes before this is read, and with overlap_param_gather not on all ranks at once.
        logit_scale = output.logit_scale.detach().clone()
        parts = LossOutput(whole_generation, reported.detach(), contrast, logit_scale)
        value = generation.detach() + parts.contrastive_loss
        if output.latent_errors_N is not None:
            regression = self._latent_regression(micro_batch, output.latent_errors_N)
            total = total + self.loss.latent_regression_loss_weight * regression
            parts = dataclasses.replace(parts, latent_regression_loss=regression.detach())
            value = value + regression.detach()
        return total * _one_if_finite(value), parts

    def _latent_regression(self, micro_batch: int, errors_N: Tensor) -> Tensor:
        """Return this micro-batch's share of the mean error over the images that are contrasted."""
        is_pair_N = self.agreed.micro_batches[micro_batch].pair_mask.to(errors_N.device)
        return errors_N.masked_fill(~is_pair_N, 0.0).sum() / max(1, self.agreed.num_pairs)


def _one_if_finite(value: Tensor) -> Tensor:
    """Return a scalar to multiply the loss by: 1, which changes no bit, or NaN where ``value`` is not finite.

    A loss may be infinite, or no number, while its gradient is finite. So the gradient tells of it, and through its
    norm all ranks hear of it, without waiting for the device and without another collective.
    """
    return torch.where(torch.isfinite(value), 1.0, torch.nan).to(value)


def _leaf(features_ND: Tensor) -> Tensor:
    """Return features to differentiate by, in at least float32: their gradient is rounded once, behind the weights."""
    dtype = torch.promote_types(features_ND.dtype, torch.float32)
    return features_ND.detach().to(dtype).requires_grad_()


def losses_and_gradients(engine: Engine, agreed: AgreedStep, whole_gradients: bool = False) -> list[LossOutput]:
    """Add the gradient of a step's loss to the gradient buffers; collective over all ranks.

    Args:
        engine: the model.
        agreed: the step.
        whole_gradients: sum gradients on every data-parallel rank, and not only the slice that the rank's optimizer
            needs; for inspection.

    Returns:
        One per micro-batch on the last stage; empty elsewhere.
    """
    loss, micro_batches, step = engine.config.loss, agreed.micro_batches, agreed.step
    objective = Objective(loss, agreed, engine.groups)
    # Without weight there is no gradient to fetch; what is reported are then contrasts of single micro-batches.
    is_global = loss.contrastive_scope == "global" and loss.contrastive_loss_weight > 0
    if not is_global or len(micro_batches) == 1:
        return engine.forward_backward(micro_batches, objective, step, whole_gradients=whole_gradients)

    def objective_of(features: list[LCLOutput]) -> Objective:
        return Objective(loss, agreed, engine.groups, objective.contrast_of_features(features))

    if loss.contrastive_keep_graphs:
        return engine.forward_backward_of_graphs(micro_batches, objective_of, step, whole_gradients)
    features = engine.features(micro_batches, step)
    whole = objective_of(features) if engine.has_losses else objective
    return engine.forward_backward(micro_batches, whole, step, whole_gradients=whole_gradients)
