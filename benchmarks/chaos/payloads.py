"""Files that run code when they are unpickled, in the place of every file that is read; counted is what was run.

Each payload makes a folder when it is run. It is put in the place of every file of a checkpoint, of a folder of
weights and of a corpus, and beside them under the names that megatron-core reads: once as it is, once with all hashes
made to fit, as somebody with the right to write would do.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.chaos.batches import by_kind, in_batches
from benchmarks.chaos.checkpoints import STEPS, saved_run
from benchmarks.chaos.damage import files_of
from benchmarks.chaos.findings import Findings
from benchmarks.chaos.processes import call_in_child
from lcl_megatron.checkpoint.folders import step_folder
from lcl_megatron.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointError,
    FileEntry,
    file_sha256,
    read_manifest,
)
from lcl_megatron.checkpoint.weights import read_weights, write_weights
from lcl_megatron.config import ConfigError, RunConfig
from lcl_megatron.data.storage import corpus as corpora
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.indexed_file import CorpusError
from lcl_megatron.training.setup import run_from

LANE = "payloads"
FOREIGN_NAMES = (".metadata", "common.pt", "metadata.json", "__0_0.distcp", "model.pt", "pytorch_model.bin")
"""Names that megatron-core, torch and transformers unpickle."""
EXPLAINED = (ConfigError, CheckpointError, CorpusError)
"""Errors that say what is wrong with a file."""


class Payload:
    """Makes a folder when it is unpickled.

    Args:
        marker: the folder.
    """

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str, int, bool]]:
        """Return what the unpickler is to call."""
        return os.makedirs, (self._marker, 0o777, True)


def forms(marker: Path) -> dict[str, bytes]:
    """Return a payload in each form that some library unpickles.

    Args:
        marker: the folder that it makes.
    """
    payload = Payload(marker)
    found = {f"pickle, protocol {protocol}": pickle.dumps(payload, protocol) for protocol in (0, 2, 4, 5)}
    for name, is_zip in (("torch", True), ("torch, legacy", False)):
        stream = io.BytesIO()
        torch.save({"model": payload}, stream, _use_new_zipfile_serialization=is_zip)
        found[name] = stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, np.array([payload], dtype=object), allow_pickle=True)
    return found | {"numpy": stream.getvalue()}


def works(folder: Path) -> bool:
    """Return whether every form runs where it is unpickled without care: else counting would prove nothing.

    Args:
        folder: scratch.
    """
    for number, (form, content) in enumerate(forms(folder / "marker").items()):
        stream = io.BytesIO(content)
        if form.startswith("pickle"):
            pickle.loads(content)
        elif form.startswith("torch"):
            torch.load(stream, weights_only=False)
        else:
            np.load(stream, allow_pickle=True)
        if not (folder / "marker").is_dir():
            raise RuntimeError(f"payload {number} ({form}) does not run even where it should")
        (folder / "marker").rmdir()
    return True


def run(seed: int, cases: Sequence[int] | None, stride: int, folder: Path) -> Findings:
    """Put every payload in every place.

    Args:
        seed: of the campaign, for messages; there is no chance in this lane.
        cases: numbers of the cases; None = every ``stride``-th.
        stride: see ``cases``.
        folder: scratch, in memory if possible.
    """
    findings = Findings(LANE, seed)
    call_in_child(works, folder)
    config = saved_run(folder)
    call_in_child(_make_places, config, folder)
    places = all_places(folder)
    numbers = range(0, len(places), stride) if cases is None else cases
    findings.cases = in_batches(_batch, numbers, findings, config, folder)
    findings.figures = {
        "payloads": len(findings.cases),
        "payloads_executed": sum(case["executed"] for case in findings.cases),
        "kinds": by_kind(findings.cases),
    }
    for case in findings.cases:
        if case["executed"] or case["outcome"] == "unexplained":
            findings.fail(case["case"], f"{case['kind']} as {case['file']}: {case['outcome']}; {case['message']}")
    return findings


def _make_places(config: RunConfig, folder: Path) -> None:
    """Lay out what payloads are put into: one checkpoint, a folder of weights; the corpus is there."""
    checkpoint = step_folder(config.checkpoint.save, STEPS[-1])
    shutil.copytree(checkpoint, folder / "checkpoint" / checkpoint.name)
    write_weights(read_weights(checkpoint), folder / "weights")
    shutil.copytree(config.data.data_path[0], folder / "corpus")


def all_places(folder: Path) -> list[tuple[str, str, str, bool]]:
    """Return (what is attacked, file, form, whether hashes are made to fit) of every case."""
    places = []
    for kind in ("checkpoint", "weights", "corpus"):
        names = dict.fromkeys([*(path.name for path in files_of(_attacked(folder, kind))), *FOREIGN_NAMES])
        for name in names:
            places += [(kind, name, form, fits) for form in forms(folder) for fits in (False, True)]
    return places


def _attacked(folder: Path, kind: str) -> Path:
    return next((folder / kind).iterdir()) if kind == "checkpoint" else folder / kind


def _batch(cases: Sequence[int], config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    logging.disable(logging.CRITICAL)
    own = folder / f"batch-{cases[0]}"
    for kind in ("checkpoint", "weights", "corpus"):
        shutil.copytree(folder / kind, own / kind)
    places = all_places(folder)
    return [_case(number, places[number], config, own) for number in cases]


def _case(number: int, place: tuple[str, str, str, bool], config: RunConfig, folder: Path) -> dict[str, Any]:
    kind, name, form, fits = place
    attacked, marker = _attacked(folder, kind), folder / "marker"
    before = {path: path.read_bytes() for path in files_of(attacked)}
    (attacked / name).write_bytes(forms(marker)[form])
    if fits and kind != "weights" and name in {path.name for path in before}:
        {"checkpoint": _seal_checkpoint, "corpus": _seal_corpus}[kind](attacked, name)
    outcomes, messages = [], []
    for reader in READERS[kind]:
        outcome, message = _read(reader, config, folder)
        outcomes.append(outcome)
        messages.append(message)
    executed = marker.is_dir()
    shutil.rmtree(marker, ignore_errors=True)
    if name not in {path.name for path in before}:
        (attacked / name).unlink()
    for path, content in before.items():
        path.write_bytes(content)
    outcome = "executed" if executed else max(outcomes, key=("not read", "refused", "unexplained").index)
    seal = "hashes fit" if fits else "as it is"
    return {
        "case": number,
        "kind": f"{kind}, {seal}",
        "file": name,
        "form": form,
        "outcome": outcome,
        "executed": int(executed),
        "message": "; ".join(filter(None, messages)),
    }


def _read(reader: Callable[[RunConfig, Path], None], config: RunConfig, folder: Path) -> tuple[str, str]:
    """Return how reading ends: it is refused, or the file is not needed."""
    try:
        reader(config, folder)
    except EXPLAINED:
        return "refused", ""
    except Exception as error:
        return "unexplained", f"{reader.__name__}: {type(error).__name__}: {error}"
    return "not read", ""


def _continue_run(config: RunConfig, folder: Path) -> None:
    """Start a run from the checkpoint, with and without comparing it with its manifest."""
    for verify in (True, False):
        checkpoint = dataclasses.replace(
            config.checkpoint, save="", load=str(folder / "checkpoint"), verify_checkpoint=verify
        )
        training = dataclasses.replace(config.training, train_iters=STEPS[-1] + 1)
        with run_from(dataclasses.replace(config, checkpoint=checkpoint, training=training)):
            pass


def _export(config: RunConfig, folder: Path) -> None:
    """Read the checkpoint's weights as exporters and evaluations do."""
    read_weights(folder / "checkpoint")


def _read_weights(config: RunConfig, folder: Path) -> None:
    """Read a folder of weights."""
    read_weights(folder / "weights")


def _begin_run(config: RunConfig, folder: Path) -> None:
    """Start a run from the weights."""
    checkpoint = dataclasses.replace(config.checkpoint, save="", init_weights=str(folder / "weights"))
    with run_from(dataclasses.replace(config, checkpoint=checkpoint)):
        pass


def _train_on_corpus(config: RunConfig, folder: Path) -> None:
    """Read the corpus: every document, every image, and steps of a run."""
    corpus = Corpus.open(folder / "corpus")
    for segment in range(corpus.num_segments):
        corpus.segment_tokens(segment)
    for image in range(corpus.num_images):
        corpus.image_bytes(image)
        corpus.image_source(image)
    data = dataclasses.replace(config.data, data_path=(str(folder / "corpus"),))
    checkpoint = dataclasses.replace(config.checkpoint, save="")
    with run_from(dataclasses.replace(config, data=data, checkpoint=checkpoint)) as run:
        next(iter(run.loader))
    corpus.verify()


READERS: dict[str, tuple[Callable[[RunConfig, Path], None], ...]] = {
    "checkpoint": (_continue_run, _export),
    "weights": (_read_weights, _begin_run),
    "corpus": (_train_on_corpus,),
}
"""What reads each kind of folder."""


def _seal_checkpoint(checkpoint: Path, name: str) -> None:
    """Make the manifest fit a file that was replaced."""
    if name == MANIFEST_FILE:
        return
    manifest, path = read_manifest(checkpoint), checkpoint / name
    files = manifest.files | {name: FileEntry(path.stat().st_size, file_sha256(path))}
    (checkpoint / MANIFEST_FILE).write_text(dataclasses.replace(manifest, files=files).text(), encoding="utf-8")


def _seal_corpus(corpus: Path, name: str) -> None:
    """Make the manifest fit a file that was replaced."""
    if name == "manifest.json":
        return
    path = corpus / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"][name] = {"bytes": (corpus / name).stat().st_size, "sha256": file_sha256(corpus / name)}
    manifest["fingerprint"] = corpora.fingerprint(manifest["files"])
    if name == "tokenizer.model":
        manifest["tokenizer"]["fingerprint"] = file_sha256(corpus / name)
    manifest["sha256"] = corpora.manifest_hash(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
