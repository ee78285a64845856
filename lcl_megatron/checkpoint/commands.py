"""Subcommands of ``tools/convert_checkpoint.py``: one function each, whose arguments are its flags.

Each returns what the tool prints, of which the last line is one JSON object, and the exit status.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from lcl_megatron.checkpoint.convert.importing import ImportOptions, import_weights, measure_released_file
from lcl_megatron.checkpoint.convert.measurement import Measurement
from lcl_megatron.checkpoint.convert.official_file import Precision, write_official
from lcl_megatron.checkpoint.export import ExportReport, export_weights, with_measurements, write_report
from lcl_megatron.checkpoint.stock_libraries import LibraryError
from lcl_megatron.checkpoint.weights import ModelWeights, read_weights

_NEEDS_MEGATRON = (
    "--verify compares with the model's own outputs and needs {}; install megatron-core, or leave --verify out"
)


class Outcome(NamedTuple):
    """What a subcommand ends with."""

    text: str
    """For stdout."""
    status: int = 0
    """Exit status."""


def export(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")],
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")],
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


def import_source(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")],
    options: Annotated[ImportOptions, tyro.conf.arg(name="")],
    verify: bool = False,
) -> Outcome:
    """Write weights from elsewhere as a folder of weights, from which runs start (--init-weights).

    Sources: FILE.pt or FILE.safetensors of the released LCL code; clip:DIR_OR_NAME; open_clip:MODEL/PRETRAINED or
    open_clip:MODEL/FILE; timm:NAME; DIR: a folder of one of these libraries, a training checkpoint, or weights.

    Args:
        source: Where the weights are.
        output: Folder to make.
        options: What may be changed on the way.
        verify: Compare with the library's own outputs on random images, and with what was written; exit status 1
            beyond 1e-5 of the largest output, or where a weight does not come back as it was.
    """
    try:
        weights, measurements = import_weights(source, output, options, verify)
    except ModuleNotFoundError as error:
        raise LibraryError(_NEEDS_MEGATRON.format(error.name)) from error
    count = sum(tensor.numel() for tensor in weights.state.values())
    return _judged(
        f"{output}: {', '.join(weights.parts)}, {count / 1e6:.2f} M parameters\n"
        f"train from it: pretrain_lcl.py --config {output}/run.toml --init-weights {output} --data-path ... --save ...",
        measurements,
    )


def official(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")],
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    precision: Precision = "fp32",
    verify: bool = False,
) -> Outcome:
    """Write a checkpoint as a file for the released LCL code and open_clip.

    Args:
        checkpoint: Training checkpoint, folder of checkpoints (the newest is taken), or folder of weights.
        output: File to write.
        precision: Number format in the file.
        verify: Read the file back, and compare open_clip's outputs with the model's own on random images; exit status 1
            as for import.
    """
    weights = read_weights(checkpoint)
    write_official(weights, output, precision)
    try:
        measurements = measure_released_file(output, weights, precision) if verify else {}
    except ModuleNotFoundError as error:
        raise LibraryError(_NEEDS_MEGATRON.format(error.name)) from error
    return _judged(f"{output}: written in {precision}", measurements)


COMMANDS: dict[str, Callable[..., Outcome]] = {"export": export, "import": import_source, "official": official}
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
    try:
        measurements = measure(report, weights, output)
    except LibraryError as error:
        raise LibraryError(
            f"{output} is written, but --verify could not load it: {error}; or leave --verify out"
        ) from error
    report = with_measurements(report, measurements)
    write_report(report, output)
    return report


def _judged(text: str, measurements: Mapping[str, Measurement]) -> Outcome:
    """Return the outcome of a command without a report of its own."""
    lines = [text]
    for name, one in measurements.items():
        verdict = "ok" if one.passed else f"BEYOND {one.limit:.0e}"
        lines.append(f"  {one.max_abs_difference:9.2e}  {verdict}  {name}")
    lines.append(json.dumps({name: one.max_abs_difference for name, one in measurements.items()}))
    return Outcome("\n".join(lines), int(not all(one.passed for one in measurements.values())))


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
