"""Plans as a table for people, as JSON for programs, and as a page with drawings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcl_megatron.config import LanguageConfig, VisionConfig
from lcl_megatron.config.errors import require
from lcl_megatron.costs.plans import GIB, Plan, efficiencies
from lcl_megatron.costs.step_time import Scenario
from lcl_megatron.costs.traffic import totals
from lcl_megatron.data.pages.drawing import PALETTE, figure, picture
from lcl_megatron.data.pages.page import element, svg_image, table, write_page

HEAD = (
    "GPUs", "tp", "cp", "pp", "dp", "rows x number", "GiB", "step s", "images/s", "per GPU", "MFU %", "efficiency %",
    "waits %", "bubble %", "2nd pass %", "sent GiB",
)  # fmt: skip
"""Columns of the table; rows of a micro-batch times their number; ``tp`` with ``s`` = the sequence is split too."""


def rows(plans: Sequence[Plan]) -> list[list[str]]:
    """Return the table's rows, one per number of GPUs."""
    found = []
    for plan, efficiency in zip(plans, efficiencies(plans), strict=True):
        ranks, time = plan.estimate.ranks, plan.estimate.time
        split = "s" if plan.config.parallel.sequence_parallel else ""
        micro_batches = f"{plan.config.training.micro_batch_size} x {len(plan.estimate.counts.micro_batches)}"
        found.append(
            [
                f"{plan.gpus:,}",
                f"{ranks.tp}{split}",
                str(ranks.cp),
                str(ranks.pp),
                str(ranks.dp),
                micro_batches,
                f"{plan.worst_memory.total / GIB:.1f}",
                f"{time.total:.3f}",
                f"{plan.images_per_s:,.0f}",
                f"{plan.images_per_s_per_gpu:.0f}",
                f"{100 * plan.utilization:.1f}",
                f"{100 * efficiency:.1f}",
                f"{100 * time.exposed / time.total:.1f}",
                f"{100 * time.bubble / time.total:.1f}",
                f"{100 * time.second_forward / time.total:.1f}",
                f"{plan.estimate.sent_bytes() / GIB:.2f}",
            ]
        )
    return found


def text(scenario: Scenario, plans: Sequence[Plan]) -> str:
    """Return everything for a terminal: assumptions, table, memory and traffic of the first and the last plan."""
    lines = [*_inputs(scenario), "", *_columns([list(HEAD), *rows(plans)]), ""]
    for plan in dict.fromkeys((plans[0], plans[-1])):
        lines += [*_details(plan), ""]
    lines.append("These are predictions of a model (docs/planning.md), not measurements.")
    return "\n".join(lines)


def as_json(scenario: Scenario, plans: Sequence[Plan]) -> dict[str, Any]:
    """Return inputs and plans as JSON values; times in seconds, sizes in bytes."""
    return {
        "device": dataclasses.asdict(scenario.device),
        "assumptions": dataclasses.asdict(scenario.assumptions),
        "row_means": dataclasses.asdict(scenario.means),
        "contrastive_scope": scenario.config.loss.contrastive_scope,
        "contrastive_keep_graphs": scenario.config.loss.contrastive_keep_graphs,
        "vision_recompute_granularity": scenario.config.vision.recompute_granularity,
        "language_recompute_granularity": scenario.config.language.recompute_granularity,
        "global_batch_size": scenario.config.training.global_batch_size,
        "plans": [
            {
                "gpus": plan.gpus,
                "tensor_model_parallel_size": plan.estimate.ranks.tp,
                "sequence_parallel": plan.config.parallel.sequence_parallel,
                "context_parallel_size": plan.estimate.ranks.cp,
                "pipeline_model_parallel_size": plan.estimate.ranks.pp,
                "data_parallel_size": plan.estimate.ranks.dp,
                "micro_batch_size": plan.config.training.micro_batch_size,
                "micro_batches": len(plan.estimate.counts.micro_batches),
                "memory_bytes": plan.worst_memory.total,
                "images_per_s": plan.images_per_s,
                "model_flops_utilization": plan.utilization,
                "efficiency": efficiency,
                "sent_bytes_per_gpu": plan.estimate.sent_bytes(),
                "step_s": plan.estimate.time.total,
                "time_s": dataclasses.asdict(plan.estimate.time),
            }
            for plan, efficiency in zip(plans, efficiencies(plans), strict=True)
        ],
    }


def write(scenario: Scenario, plans: Sequence[Plan], output: Path) -> None:
    """Write a page (``.html``) or one picture (``.png``, ``.pdf``, ``.svg``).

    Raises:
        ConfigError: the suffix is another one.
    """
    suffix = output.suffix.lower()
    require(
        suffix in (".html", ".png", ".pdf", ".svg"), f"cannot write {output.name}; choose .html, .png, .pdf or .svg"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    if suffix != ".html":
        output.write_bytes(_draw(plans, suffix[1:]))
        return
    drawing = svg_image(_draw(plans, "svg"), "Throughput, efficiency and step time over the number of GPUs")
    page = write_page(
        "Plan of a run",
        "img { max-width: 100% } pre { white-space: pre-wrap }",
        element("p", "Predictions of a model (docs/planning.md), not measurements."),
        drawing,
        table(HEAD, rows(plans)),
        element("h2", "What was assumed"),
        element("pre", "\n".join(_inputs(scenario))),
        *(element("pre", "\n".join(_details(plan))) for plan in dict.fromkeys((plans[0], plans[-1]))),
    )
    output.write_text(page, encoding="utf-8")


def _inputs(scenario: Scenario) -> list[str]:
    means, device, config, loss = scenario.means, scenario.device, scenario.config, scenario.config.loss
    return [
        f"global batch {config.training.global_batch_size:,} rows of {config.data.seq_length:,} "
        f"positions, {means.images * config.training.global_batch_size:,.0f} images",
        f"a row: {means.images:.2f} images, {means.tokens:.0f} tokens, {means.targets:.0f} targets, documents of "
        f"{means.squared_lengths / means.tokens:.0f} tokens (weighted by length)",
        f"contrastive scope {loss.contrastive_scope}{' with graphs kept' if loss.contrastive_keep_graphs else ''}, "
        f"recomputation: vision {_recomputation(config.vision)}, language {_recomputation(config.language)}; "
        f"drop-path {config.vision.drop_path_rate:g}, {config.vision.drop_path_mode}",
        "device: " + ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(device).items()),
        "assumed: " + ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(scenario.assumptions).items()),
    ]


def _recomputation(tower: VisionConfig | LanguageConfig) -> str:
    if tower.recompute_granularity == "full" and tower.recompute_num_layers:
        return f"full of {tower.recompute_num_layers} layers per stage"
    return tower.recompute_granularity


def _columns(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]


def _details(plan: Plan) -> list[str]:
    memory, time = plan.worst_memory, plan.estimate.time
    sizes = {
        "parameters": memory.state.parameters,
        "gradients": memory.state.gradients,
        "optimizer": memory.state.optimizer,
        f"vision activations x {memory.in_flight}": memory.in_flight * memory.vision_per_micro_batch,
        f"language activations x {memory.in_flight}": memory.in_flight * memory.language_per_micro_batch,
        "features and tile": memory.features,
        "logits or gradients": memory.working,
    }
    lines = [f"{plan.gpus:,} GPUs, GiB of the fullest rank: "]
    lines[0] += ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
    parts = ", ".join(f"{name} {1000 * value:.1f}" for name, value in vars(time).items() if value)
    lines.append(f"{plan.gpus:,} GPUs, ms of a step: {parts}")
    for stage, transfers in enumerate(plan.estimate.traffic):
        moved = ", ".join(
            f"{group} {kind} {calls:,} calls {size / GIB:.3f} GiB"
            for (group, kind), (calls, size) in totals(transfers).items()
        )
        lines.append(f"{plan.gpus:,} GPUs, a rank of stage {stage}: {moved or 'nothing is sent'}")
    return lines


def _draw(plans: Sequence[Plan], kind: str) -> bytes:
    """Return three panels over the number of GPUs: throughput, efficiency, and where a step's time goes."""
    gpus = [plan.gpus for plan in plans]
    with figure(13.5, 3.6) as drawn:
        left, middle, right = drawn.subplots(1, 3)
        left.plot(gpus, [plan.images_per_s for plan in plans], "o-", color=PALETTE[0], label="predicted")
        first = plans[0].images_per_s_per_gpu
        left.plot(gpus, [first * n for n in gpus], ":", color=PALETTE[5], label=f"in proportion to {gpus[0]} GPUs")
        left.set_yscale("log")
        left.set_title("Images per second", loc="left")
        left.legend(frameon=False)
        middle.plot(gpus, [100 * e for e in efficiencies(plans)], "o-", color=PALETTE[0], label="efficiency")
        middle.plot(gpus, [100 * plan.utilization for plan in plans], "s--", color=PALETTE[1], label="MFU")
        middle.set_ylim(0, 105 * max(efficiencies(plans)))
        middle.set_title("Percent", loc="left")
        middle.legend(frameon=False)
        names = [field.name for field in dataclasses.fields(plans[0].estimate.time)]
        places, bottom = range(len(plans)), [0.0] * len(plans)
        for index, name in enumerate(names):
            shares = [100 * getattr(plan.estimate.time, name) / plan.estimate.time.total for plan in plans]
            if max(shares) >= 0.05:
                right.bar(places, shares, bottom=bottom, color=_colour(index), label=name.replace("_", " "))
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        right.set_xticks(places, [str(n) for n in gpus])
        right.set_title("Where a step's time goes, %", loc="left")
        right.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
        for axes in (left, middle):
            axes.set_xscale("log", base=2)
            axes.set_xticks(gpus, [str(n) for n in gpus])
            axes.minorticks_off()
            axes.grid(True)
        for axes in (left, middle, right):
            axes.set_xlabel("GPUs")
        return picture(drawn, kind)


def _colour(index: int) -> str:
    more = ("#8fb3e8", "#e8b98f", "#9bd1b0")
    return (*PALETTE, *more)[index % (len(PALETTE) + len(more))]
