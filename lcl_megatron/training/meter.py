"""Turning a stretch of steps into one report: mean losses, speed, and the monitors in which collapse shows.

The text loss does not show a collapsed encoder (section 4.2 of the paper); retrieval accuracy, spread and effective
rank of the features do.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from lcl_megatron.data.batch import StepBatch
from lcl_megatron.losses.monitors import alignment, background_similarity, effective_rank, feature_std
from lcl_megatron.parallel.report import sum_over_data_parallel
from lcl_megatron.training.flops import device_peak_flops, layout_flops, model_flops_utilization
from lcl_megatron.training.stragglers import RankWork, report_work

if TYPE_CHECKING:
    from lcl_megatron.parallel.contrastive import ContrastiveOutput, Repeats
    from lcl_megatron.training.run import Run
    from lcl_megatron.training.step import StepResult

_FEATURE_NAMES = (
    "features/pooled_std",
    "features/pooled_effective_rank",
    "features/context_std",
    "features/context_effective_rank",
    "contrast/pair_similarity",
    "contrast/background_similarity",
    "contrast/num_negatives",
    "contrast/logit_scale",
)
_FEATURES = len(_FEATURE_NAMES)
_SUM_NAMES = (
    "generation",
    "contrastive",
    "latent_regression",
    "image_hits",
    "context_hits",
    "same_image",
    "same_context",
    "empty_context",
)
_SUMS = len(_SUM_NAMES)


class Meter:
    """Collects steps since the last report. Tensors stay on the device until a report is due."""

    def __init__(self, run: Run) -> None:
        self.run = run
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.peak_flops = device_peak_flops(name, run.config.training.precision)
        self._start()

    def _start(self) -> None:
        self.since = time.perf_counter()
        self.data_wait_s = 0.0
        self.steps = self.taken = self.images = self.tokens = self.pairs = 0
        self.flops = self.learning_rate = 0.0
        self.sums = torch.zeros(_SUMS, device=self.run.engine.device)
        self.result: StepResult | None = None
        """The last step that was taken."""
        self.run.engine.work.take()

    def add(self, result: StepResult, batch: StepBatch, data_wait_s: float) -> None:
        """Add a step.

        Args:
            result: what the step returned.
            batch: what it read.
            data_wait_s: seconds the step waited for it.
        """
        layout = batch.layout
        self.steps += 1
        self.images += int(layout.num_images.sum())
        self.tokens += layout.num_tokens
        self.data_wait_s += data_wait_s
        self.flops += layout_flops(self.run.config, layout)
        self.learning_rate = result.learning_rate
        if result.skip is not None:
            return
        self.taken += 1
        self.pairs += result.agreed.num_pairs
        self.result = result
        for losses in result.losses:
            nothing = torch.zeros_like(losses.generation_loss)
            contrast, regression = losses.contrast, losses.latent_regression_loss
            errors = nothing if regression is None else regression
            counted = [nothing] * 5 if contrast is None else _counts(contrast)
            self.sums += torch.stack([losses.generation_loss, losses.contrastive_loss, errors, *counted])

    def report(self, bad_images: int) -> dict[str, float]:
        """Return the metrics since the last report, and start anew; collective over all ranks.

        Args:
            bad_images: images that could not be decoded since the process started.
        """
        assert self.steps, "a report needs at least one step"
        run = self.run
        seconds = time.perf_counter() - self.since
        metrics = {} if self.result is None else self._of_taken_steps(self.result)
        metrics |= {
            "optimizer/learning_rate": self.learning_rate,
            "perf/images_per_s": self.images / seconds,
            "perf/tokens_per_s": self.tokens / seconds,
            "perf/step_ms": 1000 * seconds / self.steps,
            "perf/data_wait_ms": 1000 * self.data_wait_s / self.steps,
            "perf/tflops_per_device": self.flops / seconds / run.engine.groups.world_size / 1e12,
            "data/bad_images": bad_images,
            "data/consumed_rows": run.progress.consumed_rows,
            "data/consumed_images": run.progress.consumed_images,
            "data/fill": self.tokens / self._positions(),
            "guard/skipped_steps": run.guard.skipped_steps,
        }
        work = RankWork(metrics["perf/data_wait_ms"], 1000 * run.engine.work.take() / self.steps)
        metrics |= report_work(work, run.engine.groups, run.config.guard.straggler_ratio, metrics["perf/step_ms"])
        utilization = model_flops_utilization(self.flops, seconds, run.engine.groups.world_size, self.peak_flops)
        if utilization is not None:
            metrics["perf/model_flops_utilization"] = utilization
        self._start()
        return metrics

    def _of_taken_steps(self, last: StepResult) -> dict[str, float]:
        """Return losses, contrast and features of the steps that were taken; collective over all ranks.

        Losses are means over steps; accuracies over all pairs; features are those of the last micro-batch, or, where
        all micro-batches are contrasted at once, of the last step.
        """
        run, is_last_stage = self.run, self.run.engine.has_losses
        sums = torch.cat([self.sums, self._features(last) if is_last_stage else self.sums.new_zeros(_FEATURES)])
        totals = sum_over_data_parallel(sums, run.engine.groups, is_last_stage)
        sums_by_name = dict(zip(_SUM_NAMES, totals[:_SUMS], strict=True))
        per_step = {name: value / self.taken for name, value in sums_by_name.items()}
        generation, contrastive = per_step["generation"], per_step["contrastive"]
        weights, ranks = run.config.loss, run.engine.groups.dp_size
        metrics = {
            "loss/total": weights.generation_loss_weight * generation + weights.contrastive_loss_weight * contrastive,
            "loss/generation": generation,
            "loss/contrastive": contrastive,
            "optimizer/grad_norm": last.grad_norm,
            "contrast/image_to_context_accuracy": sums_by_name["image_hits"] / max(1, self.pairs),
            "contrast/context_to_image_accuracy": sums_by_name["context_hits"] / max(1, self.pairs),
            "contrast/num_pairs": self.pairs / self.taken,
            "contrast/num_same_image": per_step["same_image"],
            "contrast/num_same_context": per_step["same_context"],
            "contrast/num_empty_context": per_step["empty_context"],
        }
        metrics |= dict(zip(_FEATURE_NAMES, (value / ranks for value in totals[_SUMS:]), strict=True))
        if weights.latent_regression_loss_weight > 0:
            metrics["loss/latent_regression"] = per_step["latent_regression"]
            metrics["loss/total"] += weights.latent_regression_loss_weight * metrics["loss/latent_regression"]
        return metrics

    def _positions(self) -> int:
        """Return how many tokens the steps' rows could hold."""
        return self.steps * self.run.config.training.global_batch_size * self.run.config.data.seq_length

    def _features(self, result: StepResult) -> torch.Tensor:
        """Return monitors of the features contrasted last, which every rank of the last stage has gathered."""
        contrast = result.losses[-1].contrast
        assert contrast is not None, "the last micro-batch reports the contrast"
        images, contexts = contrast.images_GD[contrast.is_pair_G], contrast.contexts_GD[contrast.is_pair_G]
        values = [
            feature_std(images),
            effective_rank(images),
            feature_std(contexts),
            effective_rank(contexts),
            alignment(images, contexts),
            background_similarity(images, contexts),
            # The mean over ranks is what the pairs of all ranks keep on average.
            max(0, images.shape[0] - 1)
            - _repeats(contrast).left_out * self.run.engine.groups.dp_size / max(1, images.shape[0]),
            result.losses[-1].logit_scale.exp(),
        ]
        return torch.stack([torch.as_tensor(value).to(self.sums) for value in values])


def _repeats(contrast: ContrastiveOutput) -> Repeats:
    """Return the counts of what occurs more than once: every batch of a run says what its slots show."""
    assert contrast.repeats is not None
    return contrast.repeats


def _counts(contrast: ContrastiveOutput) -> list[torch.Tensor]:
    """Return what is counted of a contrast, in the order of ``_SUM_NAMES``."""
    repeats = _repeats(contrast)
    hits = [contrast.image_hits, contrast.context_hits]
    return [*hits, repeats.same_image, repeats.same_context, repeats.empty_context]
