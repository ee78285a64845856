"""Flags of ``tools/plan_run.py``, and what they ask for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lcl_megatron.config import RunConfig
from lcl_megatron.config.errors import require
from lcl_megatron.costs.assumptions import Assumptions
from lcl_megatron.costs.counts import RowMeans, Scope
from lcl_megatron.costs.devices import Device, find_device
from lcl_megatron.costs.plans import Plan, best_plan, check_fits, configured_plan
from lcl_megatron.costs.report import as_json, text, write
from lcl_megatron.costs.step_time import Scenario

OPT_VOCABULARY = 50_272
"""Ids of OPT's tokenizer: what a vocabulary size of 0 stands for while no corpus is given."""


@dataclass(frozen=True, kw_only=True)
class DeviceValues:
    """Own values in place of the table's; 0 = the table's."""

    peak_tflops: float = 0.0
    """Dense bf16, TFLOP/s."""
    fp32_tflops: float = 0.0
    """Plain float32, TFLOP/s."""
    memory_gb: float = 0.0
    """Memory, 10^9 bytes."""
    memory_tb_s: float = 0.0
    """Memory bandwidth, 10^12 bytes per second."""
    nvlink_gb_s: float = 0.0
    """To the other GPUs of the machine, 10^9 bytes per second, one direction."""
    network_gb_s: float = 0.0
    """Network adapter of one GPU, 10^9 bytes per second, one direction."""
    gpus_per_node: int = 0
    """GPUs of one machine."""

    def applied_to(self, device: Device) -> Device:
        """Return the device with the values that are given."""
        given = {name: value for name, value in vars(self).items() if value}
        return dataclasses.replace(device, **given)


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """What is planned, on which GPUs."""

    gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    """Numbers of GPUs; efficiency is relative to the first."""
    device: str = "H100"
    """GPU of the table: A100-40G, A100-80G, H100 (SXM), H200, B200, B300, H20, MI300X."""
    device_values: DeviceValues = field(default_factory=DeviceValues)
    """Own values in place of the table's."""
    images_per_row: float = 4.0
    """Images of a row, while no --data-path is given."""
    fill: float = 0.98
    """Share of a row's positions that hold documents, while no --data-path is given."""
    documents_per_row: float = 2.0
    """Documents of a row, while no --data-path is given."""
    scope: Literal["as_configured", "micro_batch", "global"] = "as_configured"
    """Which images are contrasted with each other: --contrastive-scope, or one of the two regardless of it."""
    recompute: bool = False
    """Plan with layers that are computed again in the backward pass."""
    layout: Literal["best", "configured"] = "best"
    """``best`` = the fastest layout and micro-batch that fit; ``configured`` = those of the configuration."""
    assumptions: Assumptions = field(default_factory=Assumptions)
    """How far machines stay behind their data sheets."""
    output: Path | None = None
    """Page (.html) or picture (.png, .pdf, .svg) to write."""
    json: bool = False
    """Print nothing but one JSON object; otherwise it is the last line."""


def plan_run(flags: PlanFlags, config: RunConfig, means: RowMeans | None = None) -> str:
    """Plan a run, write what is to be written, and return what is to be printed.

    Args:
        flags: what is planned.
        config: the run.
        means: what rows of its corpora hold; None = as the flags say.

    Raises:
        ConfigError: some number of GPUs cannot run it, or the model of costs does not know what the run does.
    """
    require(len(flags.gpus) > 0, "--gpus is empty; give one or more numbers of GPUs")
    _check_known(config)
    if config.language.vocab_size == 0:
        language = dataclasses.replace(config.language, vocab_size=OPT_VOCABULARY)
        config = dataclasses.replace(config, language=language)
    if means is None:
        means = RowMeans.of_numbers(config, flags.images_per_row, flags.fill, flags.documents_per_row)
    scope: Scope = config.loss.contrastive_scope if flags.scope == "as_configured" else flags.scope
    device = flags.device_values.applied_to(find_device(flags.device))
    scenario = Scenario(config, means, device, flags.assumptions, scope, flags.recompute)
    plans = [_plan(scenario, gpus, flags.layout) for gpus in flags.gpus]
    if flags.output is not None:
        write(scenario, plans, flags.output)
    result = json.dumps(as_json(scenario, plans))
    return result if flags.json else f"{text(scenario, plans)}\n{result}"


def _check_known(config: RunConfig) -> None:
    """Refuse runs of which times and memory would come out as those of another."""
    cp = config.parallel.context_parallel_size
    require(
        cp == 1,
        f"parallel.context_parallel_size = {cp}: the plan knows neither the time nor the memory of shared rows; plan "
        "with --context-parallel-size 1",
    )
    require(
        not config.loss.contrastive_keep_graphs,
        "loss.contrastive_keep_graphs: the plan knows two passes only, and would count the activations of one "
        "micro-batch where the run keeps those of all; plan with --no-contrastive-keep-graphs",
    )


def _plan(scenario: Scenario, gpus: int, layout: str) -> Plan:
    if layout == "best":
        return best_plan(scenario, gpus)
    plan = configured_plan(scenario, gpus)
    check_fits(scenario, plan)
    return plan
