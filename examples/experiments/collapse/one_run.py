"""One encoder of the experiment: make it, score its frozen features, write ``result.json``."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import CPU_FILE, JOB_FILE, OUTPUT_FILE, RESULT_FILE, Job, RunFailedError
from supervised import LabelledFiles, TowerEncoder, train_with_labels, untrained_tower

from lcl_megatron.config import RunConfig
from lcl_megatron.config.toml import from_toml
from lcl_megatron.data.document import Document
from lcl_megatron.data.image_stores.image_folder import ImageFolder
from lcl_megatron.data.readers.formats import FORMATS
from lcl_megatron.data.storage.folder_lock import lock_folder
from lcl_megatron.evaluation.checkpoint_encoder import frozen_encoders
from lcl_megatron.evaluation.features import Encode, extract_features
from lcl_megatron.evaluation.labelled_images import DecodedImages, read_labels
from lcl_megatron.evaluation.probes import Examples, ProbeReport, probe_encoder
from lcl_megatron.parallel import engine as engines
from lcl_megatron.training.loop import train
from lcl_megatron.training.metrics_reader import RunMetrics, read_metrics
from lcl_megatron.training.setup import open_corpora, run_from, with_vocabulary


@dataclass(frozen=True)
class Made:
    """An encoder, and what its run reported."""

    encode: Encode
    """From pixels to features."""
    report: dict[str, Any]
    """Images seen, losses, monitors."""


class StoppedError(RuntimeError):
    """A run was asked to stop before its last step; it has a checkpoint and goes on when it is started again."""


def complete(folder: Path) -> None:
    """Run the job of a folder; everything that this process prints from now on goes to ``output.txt`` there.

    Args:
        folder: holds ``job.json``; receives all that the run writes, ``result.json`` last.

    Raises:
        RunFailedError: anything went wrong. One type of error, because not every one survives the way to another
            process; the original's traceback is in ``output.txt``.
    """
    # The file descriptors and not Python's names for them: loggers keep the stream that they found first.
    with open(folder / OUTPUT_FILE, "a", encoding="utf-8") as output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(output.fileno(), stream.fileno())
    begun, cpu_before = time.time(), _cpu_seconds()
    try:
        with lock_folder(folder):
            try:
                scored = _scored(folder)
            finally:
                # A run that is stopped and goes on later has cost what all attempts have.
                with open(folder / CPU_FILE, "a", encoding="utf-8") as attempts:
                    attempts.write(f"{_cpu_seconds() - cpu_before:.1f}\n")
            _write_result(folder, scored | {"wall_seconds": round(time.time() - begun, 1)})
    except Exception as error:
        traceback.print_exc()
        raise RunFailedError(f"{type(error).__name__}: {error}") from None
    finally:
        sys.stdout.flush()


def _scored(folder: Path) -> dict[str, Any]:
    """Make the encoder of a folder, score it, and return what is known of both."""
    job = Job.from_json((folder / JOB_FILE).read_text(encoding="utf-8"))
    config = from_toml(job.config, str(folder / JOB_FILE))
    make = {"pretrain": _pretrained, "supervised": _supervised, "untrained": _untrained}[job.kind]
    with make(job, config) as made:
        scores = _score(job, config, made.encode)
    return {
        **made.report,
        "linear": scores.linear.value,
        "knn": scores.knn.value,
        "test_images": scores.linear.num_examples,
        "probe_images": scores.num_train,
        "chance": scores.chance,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _write_result(folder: Path, scored: dict[str, Any]) -> None:
    """Write ``result.json``, whole or not at all."""
    attempts = (folder / CPU_FILE).read_text(encoding="utf-8").split()
    result = scored | {"cpu_seconds": round(math.fsum(map(float, attempts)), 1)}
    staged = folder / f"{RESULT_FILE}.tmp"
    staged.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    staged.replace(folder / RESULT_FILE)


@contextmanager
def _pretrained(job: Job, config: RunConfig) -> Iterator[Made]:
    """Train as ``pretrain_lcl.py`` does; a run that was cut short goes on from its checkpoint, if it has one."""
    with run_from(config) as run:
        train(run)
        step, steps = run.progress.step, config.training.train_iters
    if step < steps:
        raise StoppedError(f"stopped at step {step} of {steps}; start the experiment again to go on from there")
    metrics = read_metrics(Path(config.logging.log_dir))
    with frozen_encoders(Path(config.checkpoint.save)) as (trained, _):
        yield Made(trained, _summary(metrics))


@contextmanager
def _untrained(job: Job, config: RunConfig) -> Iterator[Made]:
    """Give the tower as every run of this seed begins with it."""
    config = with_vocabulary(config, open_corpora(config))
    groups = engines.start(config)
    try:
        tower = untrained_tower(config, groups.collection, groups.device).eval()
        yield Made(TowerEncoder(tower, groups.device), {"images_seen": 0, "steps": 0})
    finally:
        groups.destroy()


@contextmanager
def _supervised(job: Job, config: RunConfig) -> Iterator[Made]:
    """Train the tower with labels."""
    config = with_vocabulary(config, open_corpora(config))
    groups = engines.start(config)
    try:
        tower = untrained_tower(config, groups.collection, groups.device)
        files = _files_of_documents(job, config)
        seen, loss = train_with_labels(config, tower, files, job.images_per_step, groups.device)
        report = {"images_seen": seen, "steps": config.training.train_iters, "label_loss": loss}
        yield Made(TowerEncoder(tower.eval(), groups.device), report)
    finally:
        groups.destroy()


def _files_of_documents(job: Job, config: RunConfig) -> LabelledFiles:
    """Return the images that the documents show and their labels; junk, which training leaves out, has none."""
    labelled = read_labels(Path(job.labels), "pretrain")
    label = dict(zip(labelled.names, labelled.labels.tolist(), strict=True))
    shown = {
        image.name
        for shard in map(Path, job.shards)
        for item in FORMATS["mmc4"].read(shard, shard.name)
        if isinstance(item, Document)
        for image in item.images
        if image.similarity >= config.data.min_similarity
    }
    names = tuple(sorted(shown & label.keys()))
    if not names:
        raise ValueError(f"{job.labels} gives no label of an image that the documents show; are they of this data set?")
    return LabelledFiles(names, torch.tensor([label[name] for name in names]), ImageFolder(Path(job.image_root)))


def _summary(metrics: RunMetrics) -> dict[str, Any]:
    """Return what a training run reported at its end; losses and monitors as means over the last tenth."""

    def last(name: str) -> float:
        values = metrics.series[name].values
        return float(np.mean(values[-max(1, len(values) // 10) :]))

    monitors = sorted(name for name in metrics.series if name.startswith(("loss/", "features/", "contrast/")))
    return {
        "images_seen": int(metrics.series["data/consumed_images"].values[-1]),
        "steps": int(metrics.steps[-1]),
        "text_loss": last("loss/generation"),
        "monitors": {name: last(name) for name in monitors},
    }


def _score(job: Job, config: RunConfig, encode: Encode) -> ProbeReport:
    """Fit the probes on one split and score them on another."""
    train_set, test_set = (
        Examples(
            extract_features(encode, DecodedImages(images, Path(job.image_root), config.vision.image_size, 1)),
            torch.from_numpy(images.labels),
        )
        for images in (read_labels(Path(job.labels), split) for split in ("probe_train", job.test_split))
    )
    return probe_encoder(job.name, train_set, test_set)


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return math.fsum(usage.ru_utime + usage.ru_stime for usage in usages)
