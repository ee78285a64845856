"""Stored features. Oracles: the encoder called directly, and the bytes of an undisturbed cache."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lcl_megatron.evaluation.encoders.encoder import EncoderError, ImageEncoder
from lcl_megatron.evaluation.encoders.preprocessing import Preprocessing
from lcl_megatron.evaluation.transfer import feature_cache
from lcl_megatron.evaluation.transfer.feature_cache import FeatureError, cached_features, feature_bytes
from lcl_megatron.evaluation.transfer.frozen_features import LiveFeatures, StoredFeatures, open_features
from lcl_megatron.evaluation.transfer.image_sets import DataError, FolderImages
from lcl_megatron.evaluation.transfer.session import Session
from lcl_megatron.parallel.replicas import Replicas
from tests.evaluation.transfer.small_sets import SIZE, picture
from tests.parallel.test_replicas import ALONE, on_ranks

COUNT = 11


class Patches(nn.Module):
    """Two patches of three channels, a linear function of the mean colour; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(18.0).view(6, 3) / 7)
        self.images = 0

    def features(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return (images.mean(dim=(2, 3)) @ self.weight.T).view(-1, 2, 3)


def make_encoder() -> tuple[ImageEncoder, Patches]:
    model = Patches()
    encoder = ImageEncoder("patches", model, model.features, Preprocessing(SIZE, SIZE, (0.5,) * 3, (0.5,) * 3))  # type: ignore[arg-type]
    model.images = 0
    return encoder.requires_grad_(False), model


@pytest.fixture
def images(tmp_path: Path) -> FolderImages:
    (tmp_path / "images").mkdir()
    names = tuple(f"{number}.png" for number in range(COUNT))
    for number, name in enumerate(names):
        (tmp_path / "images" / name).write_bytes(picture("green", number))
    return FolderImages(tmp_path / "images", names)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "PART_IMAGES", 4)


def direct(encoder: ImageEncoder, images: FolderImages) -> Tensor:
    pixels = torch.stack([encoder.preprocessing(images.read(index)) for index in range(len(images))])
    with torch.no_grad():
        return encoder(pixels)


def test_stored_features_are_the_encoder_s_and_computed_once(tmp_path: Path, images: FolderImages) -> None:
    encoder, model = make_encoder()
    files = cached_features(encoder, images, tmp_path / "cache", ALONE, batch_size=3)
    assert model.images == COUNT
    order = np.array([10, 0, 3, 4, 4])
    torch.testing.assert_close(files[order], direct(encoder, images)[order], rtol=1e-6, atol=1e-6)
    assert len(files) == COUNT
    assert feature_bytes(encoder, COUNT, "fp32") == COUNT * 24

    model.images = 0
    again = cached_features(encoder, images, tmp_path / "cache", ALONE)
    assert model.images == 0
    assert torch.equal(again[order], files[order])


def test_parts_that_were_cut_off_are_computed_again(tmp_path: Path, images: FolderImages) -> None:
    encoder, model = make_encoder()
    cached_features(encoder, images, tmp_path / "cache", ALONE)
    (cache,) = (tmp_path / "cache").iterdir()
    for part, kept in (("part-000000", 24), ("part-000001", 0)):
        os.truncate(cache / part, kept)
    model.images = 0
    files = cached_features(encoder, images, tmp_path / "cache", ALONE)
    assert model.images == 8
    torch.testing.assert_close(files[np.arange(COUNT)], direct(encoder, images), rtol=1e-6, atol=1e-6)


def test_another_encoder_or_image_is_another_cache(tmp_path: Path, images: FolderImages) -> None:
    encoder, model = make_encoder()
    cached_features(encoder, images, tmp_path / "cache", ALONE)
    with torch.no_grad():
        model.weight[0, 0] += 1
    torch.testing.assert_close(
        cached_features(encoder, images, tmp_path / "cache", ALONE)[np.arange(COUNT)], direct(encoder, images)
    )
    (images.root / "3.png").write_bytes(picture("red", 3))
    changed = FolderImages(images.root, images.names)
    torch.testing.assert_close(
        cached_features(encoder, changed, tmp_path / "cache", ALONE)[np.arange(COUNT)], direct(encoder, changed)
    )
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_bf16_is_stored_in_half_the_bytes(tmp_path: Path, images: FolderImages) -> None:
    encoder, _ = make_encoder()
    files = cached_features(encoder, images, tmp_path / "cache", ALONE, precision="bf16")
    found = files[np.arange(COUNT)]
    assert found.dtype == torch.bfloat16
    # Eight bits, in the product and in what is stored.
    torch.testing.assert_close(found.float(), direct(encoder, images), rtol=0.02, atol=0.02)
    (cache,) = (tmp_path / "cache").iterdir()
    assert sum(part.stat().st_size for part in cache.iterdir()) == COUNT * 6 * 2


def test_a_killed_run_leaves_whole_parts_and_the_next_does_the_rest(tmp_path: Path, images: FolderImages) -> None:
    encoder, model = make_encoder()
    whole = cached_features(encoder, images, tmp_path / "whole", ALONE)[np.arange(COUNT)]
    data = (images.root / "9.png").read_bytes()
    times = (images.root / "9.png").stat()
    (images.root / "9.png").write_bytes(data[:100].ljust(len(data), b"\0"))
    os.utime(images.root / "9.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    model.images = 0
    with pytest.raises(DataError, match=r"9\.png"):
        cached_features(encoder, images, tmp_path / "cache", ALONE, batch_size=2)
    assert model.images == 8
    (cache,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in cache.iterdir()) == ["part-000000", "part-000001"]

    (images.root / "9.png").write_bytes(data)
    os.utime(images.root / "9.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    model.images = 0
    files = cached_features(encoder, images, tmp_path / "cache", ALONE)
    assert model.images == 3
    assert torch.equal(files[np.arange(COUNT)], whole)


def test_two_ranks_share_the_parts(tmp_path: Path, images: FolderImages) -> None:
    def on_rank(replicas: Replicas) -> Any:
        encoder, model = make_encoder()
        files = cached_features(encoder, images, tmp_path / "cache", replicas)
        return model.images, files[np.arange(COUNT)]

    (first, found), (second, other) = on_ranks(on_rank)
    assert (first, second) == (4 + 3, 4)
    assert torch.equal(found, other)
    torch.testing.assert_close(found, direct(make_encoder()[0], images))


def test_features_that_are_not_finite_are_named(tmp_path: Path, images: FolderImages) -> None:
    encoder, model = make_encoder()
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(FeatureError, match=r"patches: a feature of .*0\.png is not finite; its weights are damaged"):
        cached_features(encoder, images, tmp_path / "cache", ALONE)


def test_features_that_do_not_fit_are_computed_each_time(tmp_path: Path, images: FolderImages) -> None:
    encoder, model = make_encoder()
    lines: list[str] = []
    session = Session(ALONE, tmp_path / "out", tmp_path / "cache", lines.append)
    stored = open_features(encoder, images, session, "fp32", max_cache_gib=1)
    live = open_features(encoder, images, session, "fp32", max_cache_gib=1e-9)
    assert isinstance(stored, StoredFeatures)
    assert isinstance(live, LiveFeatures)
    assert "are read from" in lines[0]
    assert "are not stored (max_cache_gib = 1e-09); computed in every epoch" in lines[1]
    order = np.array([5, 2])
    model.images = 0
    torch.testing.assert_close(live.features(live.read(order)), stored.features(stored.read(order)))
    assert model.images == 2


def test_an_encoder_without_patches_is_refused() -> None:
    with pytest.raises(EncoderError, match=r"returns features of shape \(1, 3\), not patch tokens"):
        ImageEncoder("x", nn.Identity(), lambda x: x.mean((2, 3)), Preprocessing(8, 8, (0.5,) * 3, (0.5,) * 3))  # type: ignore[arg-type]
