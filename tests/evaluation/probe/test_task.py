"""Probes of any encoder. Oracle: ``probe_encoder`` on mean features that the test computes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.evaluation.encoders.load import load_encoder
from lcl_megatron.evaluation.probe.task import probe
from lcl_megatron.evaluation.probes import Examples, probe_encoder
from lcl_megatron.evaluation.transfer.image_sets import PixelReader
from lcl_megatron.evaluation.transfer.labelled_sets import LabelledSet, open_labelled
from lcl_megatron.evaluation.transfer.session import Session
from lcl_megatron.parallel.replicas import Replicas
from tests.evaluation.transfer.small_sets import ENCODER, write_folders
from tests.parallel.test_replicas import ALONE, on_ranks
from tests.stock import stock_or_skip


def test_scores_are_those_of_mean_features_on_one_rank_and_on_two(tmp_path: Path) -> None:
    stock_or_skip("timm")
    write_folders(tmp_path, "train", 10)
    write_folders(tmp_path, "val", 5)
    splits = open_labelled(tmp_path, "train", "val")
    encoder = load_encoder(ENCODER)

    def examples(split: LabelledSet) -> Examples:
        reader = PixelReader(split.images, lambda data, _key: encoder.preprocessing(data))
        with torch.no_grad():
            return Examples(encoder(reader(np.arange(len(split.images)))).mean(dim=1), torch.from_numpy(split.labels))

    report = probe_encoder("x", *map(examples, splits))

    def run(replicas: Replicas) -> Any:
        return probe(f"mine={ENCODER}", *splits, Session(replicas, tmp_path / "o", tmp_path / "c", lambda _line: None))

    for result in (run(ALONE), *on_ranks(run)):
        linear, knn = result.metrics
        assert (linear.name, knn.name) == ("linear probe", "k-NN")
        assert (linear.mean, knn.mean) == (report.linear.value, report.knn.value)
        assert linear.mean > 0.6
        assert linear.chance == pytest.approx(1 / 3)
        assert linear.interval_examples is not None
        assert (result.encoder["name"], result.mode, result.curves) == ("mine", "", {})


def test_nothing_is_stored_and_two_lines_say_what_is_done(tmp_path: Path) -> None:
    stock_or_skip("timm")
    write_folders(tmp_path, "train", 10)
    write_folders(tmp_path, "val", 5)
    lines: list[str] = []
    session = Session(ALONE, tmp_path / "o", tmp_path / "c", lines.append)
    result = probe(f"mine={ENCODER}", *open_labelled(tmp_path, "train", "val"), session)
    assert lines == ["mine: probes fitted on 30 images, scored on 15"]
    assert not session.cache.exists()
    session.add(result)
    assert [line.rsplit(" ", 1)[0] for line in lines[1:]] == ["mine: linear probe", "mine: k-NN"]
