"""Training learns: 16 documents by heart, text from images and images from text, and only through the images.

Oracle: the data. Every token is foretold by what stands before it, the text only by the image (see
``memory_document``), so that the generation loss must fall to zero; each second image belongs to one text only, so
that retrieval must be perfect. Once the images are dealt to other documents, both must be lost.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from lcl_megatron.config import RunConfig
from lcl_megatron.data.batch import PackedBatch, StepBatch
from lcl_megatron.parallel.agreement import agree
from lcl_megatron.training.loop import train
from lcl_megatron.training.objective import Objective
from lcl_megatron.training.run import Run
from lcl_megatron.training.setup import run_from
from tests.training.small_runs import DataFolder, memory_document, read_reports, small_config

DOCUMENTS = 16


def overfit_config(folder: Path) -> RunConfig:
    """All documents in each step, one per row."""
    data = DataFolder(folder / "data")
    data.write([memory_document(number) for number in range(DOCUMENTS)])
    data.preprocess()
    return small_config(
        data.corpus,
        data={"seq_length": 32},
        training={"train_iters": 120, "global_batch_size": DOCUMENTS, "micro_batch_size": DOCUMENTS},
        optimizer={"lr": 3e-3, "lr_warmup_iters": 20},
        logging={"log_dir": str(folder / "logs"), "log_interval": 20},
    )


def losses_of(run: Run, batch: StepBatch) -> tuple[float, float, float]:
    """Generation loss, and the share of images and of contexts that find each other."""
    agreed = agree(batch, run.engine.groups)
    objective = Objective(run.config.loss, agreed, run.engine.groups)
    (losses,) = run.engine.forward_backward(agreed.micro_batches, objective, batch.step, forward_only=True)
    pairs = agreed.num_pairs
    contrast = losses.contrast
    return losses.generation_loss.item(), contrast.image_hits.item() / pairs, contrast.context_hits.item() / pairs


def with_images_dealt_to_other_documents(batch: PackedBatch) -> PackedBatch:
    assert batch.images is not None
    return dataclasses.replace(batch, images=batch.images.roll(2 * 5, dims=0))


def test_sixteen_documents_are_learned_by_heart(tmp_path: Path) -> None:
    config = overfit_config(tmp_path)
    with run_from(config) as run:
        train(run)
        batch = next(iter(run.loader))
        (micro_batch,) = batch.micro_batches
        assert micro_batch.num_images == 2 * DOCUMENTS
        generation, image_accuracy, context_accuracy = losses_of(run, batch)
        dealt = dataclasses.replace(batch, micro_batches=(with_images_dealt_to_other_documents(micro_batch),))
        other_generation, other_image_accuracy, _ = losses_of(run, dealt)

    # Seen: 0.009 at the end; 0.9 once the images are dealt to other documents (the first wrong word tells the rest).
    assert generation < 0.05
    assert image_accuracy == context_accuracy == 1.0
    assert other_generation > 0.5
    assert other_image_accuracy < 0.5

    reports = read_reports(tmp_path / "logs")
    assert [report["step"] for report in reports] == [20, 40, 60, 80, 100, 120]
    assert reports[-1]["loss/generation"] == pytest.approx(generation, rel=0.2)
    assert reports[-1]["contrast/num_pairs"] == DOCUMENTS
    assert reports[0]["loss/generation"] > 50 * reports[-1]["loss/generation"]


def test_half_precision_learns_them_too(tmp_path: Path) -> None:
    """bf16 parameters with float32 main parameters; bf16 alone would lose the small updates of the last steps."""
    config = overfit_config(tmp_path)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision="bf16"))
    with run_from(config) as run:
        assert run.engine.model.vision is not None
        assert {p.dtype for p in run.engine.model.vision.parameters()} == {torch.bfloat16}
        train(run)
    reports = read_reports(tmp_path / "logs")
    # Seen: see the values of fp32 above.
    assert reports[-1]["loss/generation"] < 0.1
    assert reports[-1]["contrast/image_to_context_accuracy"] == 1.0
