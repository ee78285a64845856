"""Subcommands of ``tools/convert_checkpoint.py``: one function each, whose arguments are its flags.

Each returns what the tool prints, of which the last line is one JSON object, and the exit status.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from lcl_megatron.checkpoint.export import ExportReport, export_weights, with_measurements, write_report
from lcl_megatron.checkpoint.stock_libraries import LibraryError
from lcl_megatron.checkpoint.weights import ModelWeights, read_weights


class Outcome(NamedTuple):
    """What a subcommand ends with."""

    text: str
    """For stdout."""
    status: int = 0
    """Exit status."""


def export(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    output: Annotated[Path, tyro.conf.Positional],
    whole_model: bool = False,
    verify: bool = False,
    metrics: tuple[Path, ...] = (),
) -> Outcome:
    """Write a checkpoint as folders for timm, transformers and LLaVA.

    Needs neither a GPU nor a launcher; megatron-core and the stock libraries only with --verify.

    Args:
        checkpoint: Training checkpoint, folder of checkpoints (the newest is taken), or folder of weights.
        output: Folder to make.
        whole_model: Also write the whole model for image-text generation.
        verify: Load every folder with its library and compare with the model's own outputs; exit status 1 beyond 1e-5.
        metrics: Files with figures for the model card: metrics.jsonl of the run, JSON results of evaluations.
    """
    weights = read_weights(checkpoint)
    report = export_weights(weights, output, str(checkpoint), whole_model, metrics)
    if verify:
        report = _verify(report, weights, output)
    return Outcome(_text(report, output), int(bool(report.failures)))


COMMANDS: dict[str, Callable[..., Outcome]] = {"export": export}
"""Name on the command line -> what it runs."""


def _verify(report: ExportReport, weights: ModelWeights, output: Path) -> ExportReport:
    try:
        # The only part that runs the model.
        from lcl_megatron.checkpoint.export_check import measure
    except ModuleNotFoundError as error:
        raise LibraryError(
            f"{output} is written, but --verify compares with the model's own outputs and needs {error.name}; "
            "install megatron-core, or leave --verify out"
        ) from error
    report = with_measurements(report, measure(report, weights, output))
    write_report(report, output)
    return report


def _text(report: ExportReport, output: Path) -> str:
    lines = [
        f"{output / folder.folder}: {f'skipped: {folder.skipped}' if folder.skipped else 'written'}"
        for folder in report.folders.values()
    ]
    for name, one in report.measurements.items():
        verdict = "ok" if one.passed else "BEYOND TOLERANCE"
        lines.append(
            f"  {one.max_abs_difference:9.2e}  {verdict}  {name}: {one.loaded_as}, own outputs up to "
            f"{one.largest_output:.3g}"
        )
        lines += [f"             not loaded: {key}" for key in one.missing_keys]
        lines += [f"             without a place: {key}" for key in one.unexpected_keys]
    return "\n".join([*lines, json.dumps(report.differences)])
