"""Retrieval transfer.

Oracles: captions that name the colour of their image; one process against two; embeddings without gradient caching.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.encoders.load import load_encoder
from lcl_megatron.evaluation.retrieval import task as retrieval
from lcl_megatron.evaluation.retrieval.task import RetrievalSettings, TwoTowers, retrieve
from lcl_megatron.evaluation.transfer.caption_sets import CaptionedSet, open_captioned
from lcl_megatron.evaluation.transfer.fit import FitConfig
from lcl_megatron.evaluation.transfer.results import TaskResult
from lcl_megatron.evaluation.transfer.session import Session
from lcl_megatron.parallel.replicas import Replicas
from tests.evaluation.transfer.small_sets import COLOURS, ENCODER, write_captioned
from tests.parallel.test_replicas import ALONE, on_ranks
from tests.stock import stock_or_skip

SETTINGS = RetrievalSettings(
    fit=FitConfig(steps=30, batch_size=12, lr=1e-2, pretrained_lr=1e-3, warmup_steps=3),
    text_width=16,
    text_layers=1,
    context_length=10,
    embedding_width=8,
    eval_batch_size=5,
)


@pytest.fixture
def sets(tmp_path: Path) -> tuple[CaptionedSet, CaptionedSet]:
    """24 training images; the test set has one image of each colour, so that its captions tell them apart."""
    stock_or_skip("timm")
    stock_or_skip("open_clip")
    file = write_captioned(tmp_path, 24 + len(COLOURS), split_at=24)
    train, test = (open_captioned([file], tmp_path / "images", split) for split in ("train", "test"))
    return train, test


def run(folder: Path, sets: Any, mode: Any, replicas: Replicas = ALONE, **fields: Any) -> TaskResult:
    session = Session(replicas, folder, folder / "cache", lambda _line: None)
    (result,) = retrieve(ENCODER, sets[0], [sets[1]], dataclasses.replace(SETTINGS, **fields), mode, [0], session)
    return result


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_colours_are_found_by_their_captions(tmp_path: Path, sets: Any, mode: Any) -> None:
    result = run(tmp_path, sets, mode, fit=dataclasses.replace(SETTINGS.fit, steps=80))
    values = {metric.name: metric.mean for metric in result.metrics}
    chances = {metric.name: metric.chance for metric in result.metrics}
    assert list(values) == ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10"]
    assert [chances["TR@1"], chances["IR@1"]] == pytest.approx([1 / 3, 1 / 3])
    assert min(values["TR@1"], values["IR@1"]) > 0.8
    assert (result.data["test_images"], result.data["test_captions"]) == (3, 6)
    assert (result.task, result.mode) == ("retrieval", mode)


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_two_ranks_find_what_one_finds(tmp_path: Path, sets: Any, mode: Any) -> None:
    alone = run(tmp_path / "one", sets, mode)
    for result in on_ranks(lambda replicas: run(tmp_path / "two", sets, mode, replicas)):
        # Thirty steps in float32 carry the rounding of the first one along.
        np.testing.assert_allclose(result.curves["0"].losses, alone.curves["0"].losses, rtol=1e-2)
        assert result.metrics == alone.metrics


def test_damaged_training_images_are_left_out_of_both_sides(tmp_path: Path, sets: Any) -> None:
    """Replacing the damaged file by another image changes nothing, as long as it stays damaged."""
    broken = tmp_path / "images" / "val2014" / "3.png"
    curves = []
    for content in (b"<html>", broken.read_bytes()[:80]):
        broken.write_bytes(content)
        # Folders of their own: a fit that has ended is not repeated in the same one.
        curves.append(run(tmp_path / f"out{len(curves)}", sets, "full").curves["0"].losses)
    assert curves[0] == curves[1]
    assert np.isfinite(curves[0]).all()


def test_gradient_caching_changes_nothing() -> None:
    stock_or_skip("timm")
    torch.manual_seed(0)
    encoder = load_encoder(ENCODER, drop_path_rate=0.4)
    model = TwoTowers(encoder, 20, SETTINGS, trains=True).train()
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    ids, lengths = torch.randint(1, 20, (7, 6)), torch.tensor([6, 5, 4, 3, 2, 1, 6])
    gradients = []
    for at_once in (0, 3, 100):
        model.zero_grad()
        torch.manual_seed(1)
        image_features, text_features = model(images, ids, lengths, at_once)
        total = ALONE.contrast(image_features, text_features, model.logit_scale)
        total.backward()
        gradients.append((total.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=0)
    # One layer has no drop-path, so that parts draw nothing and the sums are the same but for rounding.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_are_refused() -> None:
    fit = dataclasses.replace(SETTINGS.fit, micro_batch_size=4)
    with pytest.raises(ConfigError, match="fit.micro_batch_size = 4: negatives are the whole batch.*embed_at_once"):
        dataclasses.replace(SETTINGS, fit=fit)
    with pytest.raises(ConfigError, match="context_length = 2; expected at least 3"):
        dataclasses.replace(SETTINGS, context_length=2)


def test_a_saved_state_is_not_taken_up_for_other_captions_or_crops(tmp_path: Path, sets: Any) -> None:
    short = dataclasses.replace(SETTINGS.fit, steps=3)
    train, test = sets
    first = run(tmp_path, sets, "full", fit=short).curves["0"].losses
    swapped = dataclasses.replace(train, captions=list(train.captions)[::-1])
    assert run(tmp_path, (swapped, test), "full", fit=short).curves["0"].losses != first
    assert run(tmp_path, sets, "full", fit=short, crop_scale=(0.1, 0.2)).curves["0"].losses != first
    assert run(tmp_path, sets, "full", fit=short).curves["0"].losses == first


def test_the_temperature_comes_back_from_its_limit(tmp_path: Path, sets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit it is the limit, and the gradient there, of captions that fit no image, leads down."""
    train, test = sets
    same = dataclasses.replace(train, captions=[("a square",)] * len(train))
    monkeypatch.setattr(retrieval, "INITIAL_LOGIT_SCALE", 6.0)
    models: list[TwoTowers] = []

    class Kept(TwoTowers):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            models.append(self)

    monkeypatch.setattr(retrieval, "TwoTowers", Kept)
    run(tmp_path, (same, test), "frozen", fit=dataclasses.replace(SETTINGS.fit, steps=10))
    (model,) = models
    assert model.logit_scale.item() < retrieval.MAX_LOGIT_SCALE - 0.01
