"""The best layout and micro-batch for a number of GPUs: all that can run are estimated, the fastest that fits wins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.validate import validate
from lcl_megatron.costs.memory import RankMemory
from lcl_megatron.costs.step_time import Scenario, StepEstimate, estimate_step
from lcl_megatron.training.flops import (
    FORWARD_AND_BACKWARD,
    head_forward_flops,
    language_forward_flops,
    pool_forward_flops,
    vision_forward_flops,
)

GIB = 1 << 30
TENSOR_SIZES = (1, 2, 4, 8)
PIPELINE_SIZES = (1, 2, 3, 4, 6, 8)
LARGEST_MICRO_BATCH = 512


@dataclass(frozen=True)
class Plan:
    """One way to run on a number of GPUs."""

    gpus: int
    """Number of GPUs."""
    config: RunConfig
    """The run with its layout and micro-batch size."""
    estimate: StepEstimate
    """What a step costs."""
    images_per_s: float
    """Images of all GPUs together, per second."""
    utilization: float
    """Useful operations over the GPUs' peak (MFU)."""

    @property
    def worst_memory(self) -> RankMemory:
        """Memory of the fullest rank."""
        return max(self.estimate.memory, key=lambda memory: memory.total)

    @property
    def images_per_s_per_gpu(self) -> float:
        """Images per second of one GPU."""
        return self.images_per_s / self.gpus


def best_plan(scenario: Scenario, gpus: int) -> Plan:
    """Return the fastest layout and micro-batch that fit the GPUs' memory.

    Raises:
        ConfigError: no layout divides the model and the batch, or none fits; the message says what is short.
    """
    _require_modelled(scenario.config)
    plans, reasons = [], []
    for config in candidates(scenario.config):
        try:
            plans.append(configured_plan(dataclasses.replace(scenario, config=config), gpus))
        except ConfigError as error:
            reasons.append(str(error))
    if not plans:
        raise ConfigError(f"{gpus} GPUs: no layout can run; the simplest fails because {_plainest(reasons)}")
    limit = memory_limit(scenario)
    fitting = [plan for plan in plans if plan.worst_memory.total <= limit]
    if not fitting:
        raise ConfigError(_what_is_short(scenario, min(plans, key=lambda plan: plan.worst_memory.total)))
    # Among equals the simplest: candidates are in this order.
    return min(fitting, key=lambda plan: plan.estimate.time.total)


def configured_plan(scenario: Scenario, gpus: int) -> Plan:
    """Return the plan of the layout and micro-batch that the configuration names, whether it fits or not.

    Raises:
        ConfigError: it cannot run.
    """
    config = scenario.config
    _require_modelled(config)
    validate(config, gpus)
    estimate = estimate_step(scenario, gpus)
    seconds = estimate.time.total
    flops = useful_flops(scenario)
    return Plan(
        gpus=gpus,
        config=config,
        estimate=estimate,
        images_per_s=scenario.means.images * config.training.global_batch_size / seconds,
        utilization=flops / (seconds * gpus * scenario.device.peak_tflops * 1e12),
    )


def check_fits(scenario: Scenario, plan: Plan) -> None:
    """Raise ConfigError if a plan needs more memory than there is."""
    if plan.worst_memory.total > memory_limit(scenario):
        raise ConfigError(_what_is_short(scenario, plan))


def candidates(config: RunConfig) -> Iterator[RunConfig]:
    """Yield the run in every layout, simple ones first; most do not divide the batch or the model.

    Context parallelism stays as it is configured.
    """
    for pipeline in PIPELINE_SIZES:
        for tensor in TENSOR_SIZES:
            for split in (False, True) if tensor > 1 else (False,):
                parallel = dataclasses.replace(
                    config.parallel,
                    tensor_model_parallel_size=tensor,
                    sequence_parallel=split,
                    pipeline_model_parallel_size=pipeline,
                    pipeline_cuts=(),
                )
                for size in _micro_batch_sizes(config.training.global_batch_size):
                    training = dataclasses.replace(config.training, micro_batch_size=size)
                    yield dataclasses.replace(config, parallel=parallel, training=training)


def memory_limit(scenario: Scenario) -> float:
    """Return the bytes that a rank may use."""
    return scenario.device.memory_gb * 1e9 - scenario.assumptions.reserve_gib * GIB


def useful_flops(scenario: Scenario) -> float:
    """Return the useful operations of a step, as ``training/flops.py`` counts them."""
    config, means = scenario.config, scenario.means
    row = (
        means.images * (vision_forward_flops(config.vision) + pool_forward_flops(config))
        + language_forward_flops(config.language, means.tokens, means.squared_lengths)
        + head_forward_flops(config.language, 1) * means.targets
    )
    return FORWARD_AND_BACKWARD * row * config.training.global_batch_size


def efficiencies(plans: Sequence[Plan]) -> list[float]:
    """Return images per second and GPU relative to the first plan's."""
    return [plan.images_per_s_per_gpu / plans[0].images_per_s_per_gpu for plan in plans]


def _require_modelled(config: RunConfig) -> None:
    """Raise ConfigError for what the model would predict wrongly."""
    stages = config.parallel.virtual_pipeline_model_parallel_size
    if stages > 1:
        raise ConfigError(
            f"parallel.virtual_pipeline_model_parallel_size = {stages}: interleaved stages are not in the model; plan "
            "with 1, of which traffic between stages is less and the bubble greater than in the run"
        )


def _micro_batch_sizes(global_batch_size: int) -> list[int]:
    largest = min(LARGEST_MICRO_BATCH, global_batch_size)
    return [size for size in range(1, largest + 1) if global_batch_size % size == 0]


def _plainest(reasons: Sequence[str]) -> str:
    return reasons[0] if reasons else "there is none to try"


def _what_is_short(scenario: Scenario, plan: Plan) -> str:
    memory, parallel = plan.worst_memory, plan.config.parallel
    parts = {
        "parameters, gradients and optimizer": memory.state.total,
        "activations": memory.activations,
        "gathered features": memory.features,
        "logits or gradients in the making": memory.working,
    }
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    graphs = "--no-contrastive-keep-graphs, " if plan.config.loss.contrastive_keep_graphs else ""
    return (
        f"{plan.gpus} x {scenario.device.name}: memory is short: tensor {parallel.tensor_model_parallel_size} x "
        f"pipeline {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}, "
        f"micro-batches of {plan.config.training.micro_batch_size} rows, needs {memory.total / GIB:.1f} GiB per GPU "
        f"({listed}) and {memory_limit(scenario) / GIB:.1f} GiB are there ({scenario.device.memory_gb:g} GB less "
        f"{scenario.assumptions.reserve_gib:g} GiB in reserve); try {graphs}--vision.recompute-granularity "
        "selective or full, a smaller --micro-batch-size, more GPUs, or GPUs with more memory"
    )
