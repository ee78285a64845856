"""The frozen encoder of a checkpoint.

Oracles: the tower of the run that wrote the checkpoint, while it is still in memory; a tower built anew from the
run's seed; a single process against the layouts that trained.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.evaluation.checkpoint_encoder import frozen_encoders, probe_checkpoint
from lcl_megatron.parallel import engine as engines
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from tests.distributed import run_distributed
from tests.training.small_runs import IMAGE_SIZE, DataFolder, plain_document, small_config

IMAGES = torch.randint(0, 256, (5, 3, IMAGE_SIZE, IMAGE_SIZE), generator=torch.Generator().manual_seed(3)).byte()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = DataFolder(tmp_path_factory.mktemp("encoder") / "data")
    folder.write([plain_document(number) for number in range(12)])
    folder.preprocess()
    return folder


def train_and_see(config: Any) -> Tensor | None:
    """Train, save, and return the features of the tower in memory, where it is whole."""
    with run_from(config) as run:
        train(run)
        if run.engine.groups.world_size > 1:
            return None
        tower = run.engine.model.vision
        run.engine.eval()
        with torch.no_grad():
            return tower(IMAGES).mean(dim=1).float()  # type: ignore[misc]


def config_of(data: DataFolder, save: Path, **sections: dict[str, Any]) -> Any:
    return small_config(
        data.corpus,
        **{
            "vision": {"drop_path_rate": 0.4},
            "checkpoint": {"save": str(save)},
            "training": {"train_iters": 4},
            **sections,
        },
    )


def test_the_encoder_of_a_checkpoint_is_the_one_that_was_trained(data: DataFolder, tmp_path: Path) -> None:
    config = config_of(data, tmp_path)
    expected = train_and_see(config)
    with frozen_encoders(tmp_path) as (trained, untrained):
        assert trained.image_size == IMAGE_SIZE
        features, before = trained(IMAGES), untrained(IMAGES)
        assert torch.equal(features, trained(IMAGES))  # no drop-path
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-7)

    config = dataclasses.replace(config, language=dataclasses.replace(config.language, vocab_size=384))
    groups = engines.start(config)
    try:
        engine = engines.build_engine(config, groups)
        engine.eval()
        with torch.no_grad():
            fresh = engine.model.vision(IMAGES).mean(dim=1)  # type: ignore[misc]
    finally:
        groups.destroy()
    torch.testing.assert_close(before, fresh, rtol=1e-6, atol=1e-7)
    assert float((features - before).norm()) > 0.01 * float(before.norm())


def _train(rank: int, world_size: int, config: Any) -> None:
    with run_from(config) as run:
        train(run)


@pytest.mark.parametrize(
    ("world_size", "sections"),
    [
        (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
        (3, {"parallel": {"pipeline_model_parallel_size": 3, "pipeline_cuts": ("vision.1", "language.1")}}),
        (
            2,
            {
                "parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
                "training": {"train_iters": 4, "micro_batch_size": 2},
                "loss": {"contrastive_scope": "global"},
            },
        ),
    ],
    ids=["tp2 sequence parallel", "pp3", "pp2 x 2 stages"],
)
def test_the_encoder_of_any_layout_is_read_by_one_process(
    data: DataFolder, tmp_path: Path, world_size: int, sections: dict[str, Any]
) -> None:
    run_distributed(_train, world_size, config_of(data, tmp_path / "many", **sections))
    expected = train_and_see(config_of(data, tmp_path / "one"))
    with frozen_encoders(tmp_path / "many") as (trained, _):
        torch.testing.assert_close(trained(IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_trained_in_half_precision_is_read_in_float32(data: DataFolder, tmp_path: Path) -> None:
    expected = train_and_see(config_of(data, tmp_path, training={"train_iters": 4, "precision": "bf16"}))
    with frozen_encoders(tmp_path) as (trained, _):
        assert {p.dtype for p in trained.engine.model.parameters()} == {torch.float32}
        features = trained(IMAGES)
    assert expected is not None
    error = float((features - expected).norm() / expected.norm())
    assert 0 < error < 0.02  # the run itself computes in bf16


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match=r"no complete checkpoint \(step-NNNNNNNN\) in"),
        frozen_encoders(tmp_path),
    ):
        pass


def test_probing_compares_the_trained_with_the_untrained(data: DataFolder, tmp_path: Path) -> None:
    train_and_see(config_of(data, tmp_path / "save"))
    names = sorted(path.name for path in data.images.iterdir())
    labels = tmp_path / "labels.csv"
    with labels.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_name", "split", "label"])
        writer.writerows((name, ("train", "test")[i % 4 == 3], i % 2) for i, name in enumerate(names))
    reports = probe_checkpoint(tmp_path / "save", labels, data.images, ("train", "test"))
    assert [report.encoder for report in reports] == ["trained", "untrained"]
    again = probe_checkpoint(tmp_path / "save", labels, data.images, ("train", "test"))
    assert [report.to_dict() for report in again] == [report.to_dict() for report in reports]
