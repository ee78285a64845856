"""The choice of layout, its errors, the report and the tool's flags.

Oracles: arithmetic by hand on the presets, the rule that a wider search can only be faster, and the ends of ranges: no
network that costs nothing is slower, no memory that is smaller holds more.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.config.sources import load_run_config
from lcl_megatron.costs.assumptions import Assumptions
from lcl_megatron.costs.commands import DeviceValues, PlanFlags, plan_run
from lcl_megatron.costs.counts import RowMeans, StepCounts
from lcl_megatron.costs.devices import DEVICE_NAMES, find_device
from lcl_megatron.costs.memory import rank_state
from lcl_megatron.costs.network import Network
from lcl_megatron.costs.parameters import stage_parameters
from lcl_megatron.costs.plans import best_plan, configured_plan, efficiencies
from lcl_megatron.costs.published import RUNS, comparison
from lcl_megatron.costs.step_time import Scenario, estimate_step
from lcl_megatron.costs.traffic import Ranks, StepTraffic, Transfer
from lcl_megatron.model.line import whole_model


def paper(*flags: str) -> RunConfig:
    return load_run_config(["--preset", "vit_l14_opt125m", "--language.vocab-size", "50272", *flags])


def scenario(config: RunConfig, **changes: Any) -> Scenario:
    plain = Scenario(config, RowMeans.of_numbers(config, 4, 0.98, 2), find_device("H100"), Assumptions())
    return dataclasses.replace(plain, **changes)


def test_parameters_of_the_paper_by_hand() -> None:
    config = paper()
    found = sum(p.numel for p in stage_parameters(config, whole_model(config.vision, config.language)))
    vision = 1024 * 3 * 14 * 14 + 1024 + 257 * 1024 + 2 * 1024 + 24 * (12 * 1024**2 + 15 * 1024) + 2 * 1024
    pool = 1024 + 3 * 2048 + 3 * (1024 * 768 + 768) + 768**2
    language = 50_304 * 768 + 2048 * 768 + 12 * (12 * 768**2 + 13 * 768) + 4 * 768 + 768**2 + 768
    assert found == vision + pool + language + 1


def test_distributed_optimizer_takes_six_bytes_and_twelve_shared_per_parameter() -> None:
    traffic = StepTraffic(paper(), 64, 0)
    numel = sum(p.numel for p in traffic.parameters)
    assert rank_state(traffic).total == pytest.approx((6 + 12 / 64) * numel, rel=2e-3)


def test_global_scope_gathers_once_and_runs_a_third_more() -> None:
    config = paper("--micro-batch-size", "8")
    one, all_images = (estimate_step(scenario(config, scope=s), 64) for s in ("micro_batch", "global"))
    gathers = [sum(t.calls for t in e.traffic[0] if t.purpose == "features") for e in (one, all_images)]
    assert gathers == [2 * 16_384 // (8 * 64), 2]
    sizes = [sum(t.bytes for t in e.traffic[0] if t.purpose == "features") for e in (one, all_images)]
    assert sizes[0] == sizes[1]
    ratio = (all_images.time.compute + all_images.time.second_forward) / one.time.compute
    assert 1.25 < ratio < 4 / 3
    # One micro-batch holds the whole step: nothing runs twice.
    single = StepCounts.of_means(paper("--micro-batch-size", "32"), one_row(), 512)
    assert len(single.micro_batches) == 1
    assert estimate_step(scenario(paper("--micro-batch-size", "32"), scope="global"), 512).time.second_forward == 0


def one_row() -> RowMeans:
    return RowMeans.of_numbers(paper(), 4, 0.98, 2)


def test_recomputation_saves_memory_and_costs_time() -> None:
    config = paper("--micro-batch-size", "8")
    plain, again = (configured_plan(scenario(config, recompute=r), 64) for r in (False, True))
    assert again.worst_memory.activations < 0.3 * plain.worst_memory.activations
    assert 1.2 < again.estimate.time.compute / plain.estimate.time.compute < 4 / 3


def test_pipeline_bubble_is_that_of_1f1b() -> None:
    config = paper("--micro-batch-size", "8", "--pipeline-model-parallel-size", "4")
    estimate = estimate_step(scenario(config), 64)
    number, stages = len(estimate.counts.micro_batches), 4
    busiest = (estimate.time.compute + estimate.time.model_communication) / number
    assert estimate.time.bubble <= (stages - 1) * busiest
    assert [memory.in_flight for memory in estimate.memory] == [4, 3, 2, 1]


def test_best_plan_is_no_slower_than_the_configured_one_and_fits() -> None:
    plan = best_plan(scenario(paper()), 64)
    assert plan.estimate.time.total <= configured_plan(scenario(paper()), 64).estimate.time.total
    assert plan.worst_memory.total < 80e9
    more = best_plan(scenario(paper()), 512)
    assert efficiencies([plan, more])[1] < 1
    assert more.estimate.time.total < plan.estimate.time.total


def test_network_times_at_the_ends() -> None:
    device, assumed = find_device("H100"), Assumptions()
    in_node, across = Network(device, assumed, Ranks(1, 1, 8)), Network(device, assumed, Ranks(1, 1, 32))
    assert in_node.is_within_node("dp")
    assert not across.is_within_node("dp")
    big = Transfer("dp", "all_reduce", "gradients", 1, 16 << 30)
    # NVLink within the machine is the narrower of the two: 0.8 x 450 GB/s against 0.94 x 8 x 50.
    assert across.seconds(big) == pytest.approx(2 * 31 / 32 * (16 << 30) / 360e9, rel=0.01)
    # Tensor-parallel ranks share the adapters: each of the two groups has half of them.
    shared = Network(device, assumed, Ranks(2, 1, 16))
    assert shared.bandwidth("dp") == pytest.approx(4 * 50e9 * 0.94)
    # Published: 97 us for 32 KiB, 453 us for 16 MiB on 4 x 8 GPUs.
    for size, published in ((32 << 10, 97.7e-6), (16 << 20, 453e-6)):
        assert across.seconds(Transfer("dp", "all_reduce", "gradients", 1, size)) == pytest.approx(published, rel=0.3)


@pytest.mark.parametrize("name", DEVICE_NAMES)
def test_every_device_of_the_table_can_be_planned_for(name: str) -> None:
    assert configured_plan(scenario(paper(), device=find_device(name)), 64).images_per_s > 0


def test_impossible_runs_say_what_is_short() -> None:
    small = dataclasses.replace(find_device("H100"), memory_gb=7)
    with pytest.raises(ConfigError, match=r"H100: memory is short.*GiB per GPU \(parameters, gradients.*--recompute"):
        best_plan(scenario(paper(), device=small), 8)
    with pytest.raises(ConfigError, match=r"7 GPUs: no layout can run.*not a multiple of micro_batch_size x data-para"):
        best_plan(scenario(paper()), 7)
    with pytest.raises(ConfigError, match=r"vision.num_attention_heads = 16 cannot be split"):
        configured_plan(scenario(paper("--tensor-model-parallel-size", "3")), 3)
    with pytest.raises(ConfigError, match="--device H9: not in the table; known: A100-40G"):
        find_device("H9")
    with pytest.raises(ConfigError, match="9 images of 256 latents leave no text"):
        RowMeans.of_numbers(paper(), 9, 0.98, 2)
    with pytest.raises(ConfigError, match="fill = 1.5; give the share"):
        RowMeans.of_numbers(paper(), 4, 1.5, 2)
    with pytest.raises(ConfigError, match="documents per row = 0; it must be positive"):
        RowMeans.of_numbers(paper(), 4, 0.98, 0)
    with pytest.raises(ConfigError, match="mean tokens of a row = 0"):
        RowMeans(1, 0, 1, 1)
    with pytest.raises(ConfigError, match="assumptions.hop_us = -1; it must not be negative"):
        Assumptions(hop_us=-1)
    with pytest.raises(ConfigError, match=r"assumptions.overlap_share = 2; it is a share, in \(0, 1\]"):
        Assumptions(overlap_share=2)
    with pytest.raises(ConfigError, match="memory_gb = -1; must be positive"):
        DeviceValues(memory_gb=-1).applied_to(find_device("H100"))
    with pytest.raises(ConfigError, match="--gpus is empty"):
        plan_run(PlanFlags(gpus=()), paper())


@pytest.mark.parametrize("layout", ["best", "configured"])
def test_runs_that_the_model_of_costs_does_not_know_are_refused(layout: Any) -> None:
    config = paper()
    shared = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, context_parallel_size=2))
    with pytest.raises(ConfigError, match=r"context_parallel_size = 2: .*plan with --context-parallel-size 1"):
        plan_run(PlanFlags(gpus=(8,), layout=layout), shared)
    kept = dataclasses.replace(config, loss=dataclasses.replace(config.loss, contrastive_keep_graphs=True))
    with pytest.raises(ConfigError, match=r"loss.contrastive_keep_graphs: .*plan with --no-contrastive-keep-graphs"):
        plan_run(PlanFlags(gpus=(8,), layout=layout), kept)


def test_flags_print_a_table_and_json(tmp_path: Path) -> None:
    output = tmp_path / "plan.html"
    printed = plan_run(PlanFlags(gpus=(64, 512), output=output), paper())
    *lines, last = printed.splitlines()
    plans = json.loads(last)["plans"]
    assert [plan["gpus"] for plan in plans] == [64, 512]
    assert plans[0]["efficiency"] == 1
    assert plans[0]["step_s"] == pytest.approx(sum(plans[0]["time_s"].values()))
    assert any("efficiency %" in line for line in lines)
    assert any("hop_us 1.5" in line for line in lines)
    page = output.read_text()
    assert "data:image/svg+xml" in page
    assert "not measurements" in page
    only = plan_run(PlanFlags(gpus=(64,), json=True, layout="configured"), paper())
    assert json.loads(only)["plans"][0]["micro_batch_size"] == 4
    with pytest.raises(ConfigError, match="cannot write plan.txt"):
        plan_run(PlanFlags(gpus=(64,), output=tmp_path / "plan.txt"), paper())


def test_published_runs_stand_beside_predictions() -> None:
    table = comparison(Assumptions())
    assert len(table.splitlines()) == 2 + sum(len(run.per_gpu) for run in RUNS)
    # No run of others is faster than the model allows.
    assert all(
        run.sequences / run.seconds(gpus, Assumptions()) > seen for run in RUNS for gpus, seen in run.per_gpu.items()
    )
