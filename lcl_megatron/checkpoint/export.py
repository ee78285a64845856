"""A model's weights as a folder that stock libraries open.

    EXPORT/config.json, model.safetensors     the vision tower: timm, transformers' AutoModel
    EXPORT/clip_vision/                       the vision tower: CLIPVisionModel (LLaVA)
    EXPORT/language_model/                    the language model: OPTForCausalLM, AutoTokenizer
    EXPORT/lcl_heads.safetensors              attention pool, contrastive head of the text, temperature; our names
    EXPORT/lcl/                               the whole model, if it is asked for
    EXPORT/README.md                          model card
    EXPORT/export_report.json                 what was written, skipped and checked

Writing needs neither megatron-core nor the libraries that the folders are for. Every folder is read back and compared
with the weights before the export gets its name.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lcl_megatron.checkpoint.convert import whole_model
from lcl_megatron.checkpoint.convert.export_targets import ExportSource, Target, json_text, targets
from lcl_megatron.checkpoint.convert.measurement import Measurement
from lcl_megatron.checkpoint.durable_files import commit_folder
from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.checkpoint.model_card import Card, card_text
from lcl_megatron.checkpoint.parameters import PARTS
from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.checkpoint.tensor_files import write_tensors
from lcl_megatron.checkpoint.weights import WEIGHTS_FILE, ModelWeights
from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import to_toml
from lcl_megatron.versions import software_versions

REPORT_FILE = "export_report.json"
HEADS_FILE = "lcl_heads.safetensors"


@dataclass(frozen=True)
class FolderReport:
    """What became of one folder."""

    folder: str
    """Inside the export."""
    skipped: str | None = None
    """Why it was not written; None = it was."""
    loaders: dict[str, str] = field(default_factory=dict)
    """Names of the figures -> what loads the folder."""
    round_trip: float | None = None
    """Largest absolute difference between the weights and the folder read back into our names; 0 = the same bits."""
    notes: tuple[str, ...] = ()
    """What is not a mere renaming."""


@dataclass(frozen=True)
class ExportReport:
    """What ``export_report.json`` says."""

    source: dict[str, Any]
    """Where the weights come from: checkpoint, step, hash of the configuration, dtypes."""
    versions: dict[str, str]
    """``software_versions``."""
    folders: dict[str, FolderReport]
    """By name of the target."""
    measurements: dict[str, Measurement] = field(default_factory=dict)
    """By name of the figure; empty = not verified."""

    @property
    def differences(self) -> dict[str, float | None]:
        """Largest absolute difference by figure; None = skipped or not verified. ``round_trip`` is over all folders."""
        figures: dict[str, float | None] = {
            name: self.measurements[name].max_abs_difference if name in self.measurements else None
            for target in targets()
            for name in target.loaders
        }
        trips = [folder.round_trip for folder in self.folders.values() if folder.round_trip is not None]
        return figures | {"round_trip": max(trips, default=None)}

    @property
    def failures(self) -> list[str]:
        """Names of the figures that did not pass; empty = all passed, or nothing was verified."""
        return [name for name, measurement in self.measurements.items() if not measurement.passed]


def export_weights(
    weights: ModelWeights,
    output: str | Path,
    checkpoint: str = "",
    include_whole_model: bool = False,
    metrics: Sequence[Path] = (),
) -> ExportReport:
    """Write an export; it exists only when it is complete.

    Args:
        weights: the model.
        output: folder to make.
        checkpoint: where the weights come from, for report and model card.
        include_whole_model: write ``lcl/``.
        metrics: files with figures for the model card: ``metrics.jsonl`` of a run, JSON results of evaluations.

    Raises:
        CheckpointError: the folder exists, the weights are of parts of a model only, or what was written does not read
            back as the weights.
        LibraryError: huggingface_hub is not installed.
        OSError: the disk is full, or a file of figures cannot be read.
    """
    output = Path(output)
    if output.exists():
        raise CheckpointError(f"{output} exists; an export is never written over another: name another folder")
    weights.require(*PARTS)
    # Needed at the end, for the model card; known before gigabytes are written.
    stock_library("huggingface_hub")
    source = ExportSource(weights)
    staging = output.with_name(f".staging-{output.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        report = _write_all(source, staging, checkpoint, include_whole_model, tuple(metrics))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    commit_folder(staging, output)
    return report


def _write_all(
    source: ExportSource, folder: Path, checkpoint: str, include_whole_model: bool, metrics: tuple[Path, ...]
) -> ExportReport:
    weights = source.weights
    wanted = [target for target in targets() if include_whole_model or target.name != "whole_model"]
    report = ExportReport(
        source=_describe_source(weights, checkpoint),
        versions=software_versions(),
        folders={target.name: _write_target(target, source, folder) for target in wanted},
    )
    heads = {name: weights.state[name].contiguous() for name in whole_model.head_names(weights.config)}
    write_tensors(heads, folder / HEADS_FILE)
    card = Card(weights, {name: part.skipped for name, part in report.folders.items()}, metrics)
    (folder / "README.md").write_text(card_text(card), encoding="utf-8")
    write_report(report, folder)
    return report


def write_report(report: ExportReport, folder: Path) -> None:
    """Write ``export_report.json`` into an export, in place of the one that is there."""
    described = asdict(report) | {"differences": report.differences}
    for name, measurement in report.measurements.items():
        described["measurements"][name]["passed"] = measurement.passed
    path = folder / f".{REPORT_FILE}"
    path.write_text(json_text(described), encoding="utf-8")
    path.replace(folder / REPORT_FILE)


def with_measurements(report: ExportReport, measurements: dict[str, Measurement]) -> ExportReport:
    """Return the report with the figures of a verification."""
    return replace(report, measurements=measurements)


def _write_target(target: Target, source: ExportSource, root: Path) -> FolderReport:
    if reason := target.refusal(source):
        return FolderReport(target.folder, skipped=reason)
    folder, config = root / target.folder, source.config
    folder.mkdir(exist_ok=True)
    for name, text in target.files(source).items():
        (folder / name).write_text(text, encoding="utf-8")
    write_tensors(target.tensors(source.weights.state, config), folder / WEIGHTS_FILE)
    restored = target.restore(load_file(folder / WEIGHTS_FILE), config)
    difference = _difference(restored, target.prepare(source.weights.state), config)
    if difference > 0:
        raise CheckpointError(
            f"{target.folder}/{WEIGHTS_FILE} reads back with differences of up to {difference:g}; the disk or the "
            "conversion is at fault, nothing was exported"
        )
    return FolderReport(target.folder, None, target.loaders, difference, target.notes)


def _difference(restored: dict[str, Tensor], expected: dict[str, Tensor], config: RunConfig) -> float:
    """Return the largest absolute difference over entries that mean something; infinity for other NaN or dtypes."""
    largest = 0.0
    for name, tensor in restored.items():
        own = expected[name]
        if name in ("language.embedding.word_embeddings.weight", "language.output_projection.weight"):
            tensor, own = (matrix[: config.language.vocab_size] for matrix in (tensor, own))
        if torch.equal(tensor, own) and tensor.dtype == own.dtype:
            continue
        difference = float((tensor.double() - own.double()).abs().max())
        largest = max(largest, difference if difference > 0 else float("inf"))
    return largest


def _describe_source(weights: ModelWeights, checkpoint: str) -> dict[str, Any]:
    progress = weights.progress
    return {
        "checkpoint": checkpoint,
        "step": None if progress is None else progress.step,
        "consumed_rows": None if progress is None else progress.consumed_rows,
        "consumed_images": None if progress is None else progress.consumed_images,
        "config_sha256": hashlib.sha256(to_toml(weights.config).encode()).hexdigest(),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.state.values()}),
    }
