"""Classification transfer.

Oracles: classes that colour decides, which any encoder can tell; one process against two; the encoder's own weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.evaluation.classification.task import ClassificationSettings, classify
from lcl_megatron.evaluation.encoders.load import load_encoder
from lcl_megatron.evaluation.transfer.augmentation import CropAndFlip
from lcl_megatron.evaluation.transfer.fit import FitConfig
from lcl_megatron.evaluation.transfer.heads import AttentionPool, Classifier
from lcl_megatron.evaluation.transfer.labelled_sets import LabelledSet, open_labelled
from lcl_megatron.evaluation.transfer.results import TaskResult
from lcl_megatron.evaluation.transfer.session import Session
from lcl_megatron.parallel.replicas import Replicas
from tests.evaluation.transfer.small_sets import ENCODER, SIZE, picture, write_folders
from tests.parallel.test_replicas import ALONE, on_ranks
from tests.stock import stock_or_skip

SETTINGS = ClassificationSettings(
    fit=FitConfig(steps=25, batch_size=12, lr=1e-2, warmup_steps=2), eval_batch_size=5, crop_scale=(0.5, 1.0)
)


@pytest.fixture
def splits(tmp_path: Path) -> tuple[LabelledSet, LabelledSet]:
    stock_or_skip("timm")
    write_folders(tmp_path / "data", "train", 8)
    write_folders(tmp_path / "data", "val", 6)
    return open_labelled(tmp_path / "data", "train", "val")


def run(
    folder: Path, splits: Any, mode: Any, replicas: Replicas = ALONE, spec: str = ENCODER, **fields: Any
) -> TaskResult:
    session = Session(replicas, folder, folder / "cache", lambda _line: None)
    settings = dataclasses.replace(SETTINGS, **fields)
    return classify(spec, *splits, settings, mode, [0, 1], session)


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_colours_are_told_apart(tmp_path: Path, splits: Any, mode: Any) -> None:
    result = run(tmp_path, splits, mode)
    (top1,) = result.metrics
    assert top1.name == "top-1"
    assert top1.chance == pytest.approx(1 / 3)
    assert top1.mean > 0.8
    assert top1.interval_examples is not None
    assert top1.interval_seeds is not None
    first, last = result.curves["0"].losses[0], result.curves["0"].losses[-1]
    assert last < 0.7 * first
    assert (result.mode, result.data["test_images"], result.data["classes"]) == (mode, 18, 3)
    assert result.encoder["fingerprint"] == load_encoder(ENCODER).fingerprint()
    assert run(tmp_path / "again", splits, mode).metrics == result.metrics


def test_features_that_are_not_stored_give_the_same(tmp_path: Path, splits: Any) -> None:
    stored, live = run(tmp_path / "a", splits, "frozen"), run(tmp_path / "b", splits, "frozen", max_cache_gib=0.0)
    np.testing.assert_allclose(live.curves["0"].losses, stored.curves["0"].losses, rtol=1e-4)
    assert not list((tmp_path / "b" / "cache").iterdir())


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_two_ranks_find_what_one_finds(tmp_path: Path, splits: Any, mode: Any) -> None:
    alone = run(tmp_path / "one", splits, mode)
    for result in on_ranks(lambda replicas: run(tmp_path / "two", splits, mode, replicas)):
        np.testing.assert_allclose(result.curves["1"].losses, alone.curves["1"].losses, rtol=1e-3)
        assert result.metrics == alone.metrics


def test_full_transfer_trains_the_encoder_with_drop_path(tmp_path: Path, splits: Any) -> None:
    deeper = ENCODER.replace("depth=1", "depth=2")  # the first layer is never dropped
    plain = run(tmp_path / "a", splits, "full", spec=deeper)
    dropping = run(tmp_path / "b", splits, "full", spec=deeper, drop_path_rate=0.5)
    fixed = dataclasses.replace(SETTINGS.fit, pretrained_lr=1e-12, weight_decay=0.0)
    untrained = run(tmp_path / "c", splits, "full", spec=deeper, fit=fixed)
    assert len({result.curves["0"].losses for result in (plain, dropping, untrained)}) == 3


def test_a_saved_state_is_not_taken_up_for_other_labels_or_crops(tmp_path: Path, splits: Any) -> None:
    short = dataclasses.replace(SETTINGS.fit, steps=3)
    train, test = splits
    first = run(tmp_path, splits, "full", fit=short).curves["0"].losses
    mended = dataclasses.replace(train, labels=train.labels[::-1].copy())
    assert run(tmp_path, (mended, test), "full", fit=short).curves["0"].losses != first
    assert run(tmp_path, splits, "full", fit=short, crop_scale=(0.1, 0.2)).curves["0"].losses != first
    assert run(tmp_path, splits, "full", fit=short).curves["0"].losses == first


def test_crops_and_flips_are_the_key_s() -> None:
    data = picture("red", 1)
    whole = CropAndFlip(SIZE, 0, (1.0, 1.0), flip=True)
    images = torch.stack([CropAndFlip(SIZE, 0, (1.0, 1.0), flip=False)(data, key) for key in range(200)])
    flipped = torch.stack([whole(data, key) for key in range(200)])
    is_flipped = (images.flip(3) == flipped).flatten(1).all(dim=1)
    assert torch.equal(flipped[~is_flipped], images[~is_flipped])
    # Four standard deviations of 200 fair coins.
    assert abs(int(is_flipped.sum()) - 100) < 29
    assert torch.equal(whole(data, 7), whole(data, 7))
    first, second = (CropAndFlip(SIZE, seed, (0.2, 1.0), flip=False)(data, 7) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_pool_is_attention_of_its_query() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(8)
    features = torch.randn(2, 5, 8)
    weights, bias = pool.attention.in_proj_weight, pool.attention.in_proj_bias
    query = pool.query[0, 0] @ weights[:8].T + bias[:8]
    key, value = features @ weights[8:16].T + bias[8:16], features @ weights[16:].T + bias[16:]
    attention = ((key @ query) / 8**0.5).softmax(dim=1)
    expected = (attention[:, None] @ value)[:, 0] @ pool.attention.out_proj.weight.T + pool.attention.out_proj.bias
    torch.testing.assert_close(pool(features), expected, rtol=1e-5, atol=1e-6)
    classifier = Classifier(8, 3)
    assert not classifier(features).any()
    assert AttentionPool(128).attention.num_heads == 2
