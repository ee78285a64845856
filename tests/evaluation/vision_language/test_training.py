"""Oracles: the gradient of the whole batch at once, on one rank; one process against two."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library
from lcl_megatron.evaluation.captioning.task import CaptionTexts
from lcl_megatron.evaluation.transfer.caption_sets import open_captioned
from lcl_megatron.evaluation.transfer.fit import FitConfig
from lcl_megatron.evaluation.transfer.image_sets import DataError, FolderImages
from lcl_megatron.evaluation.vision_language.answering import answer_prompts, pixel_reader
from lcl_megatron.evaluation.vision_language.assembly import Assembled, Recipe, assemble
from lcl_megatron.evaluation.vision_language.model import Generation
from lcl_megatron.evaluation.vision_language.sequences import Piece, TokenSequence, collate
from lcl_megatron.evaluation.vision_language.training import train_parts
from lcl_megatron.parallel.replicas import replicas_of_launcher
from tests.distributed import run_distributed
from tests.evaluation.vision_language.small_data import ENCODER, caption_file, language_model_folder, write_images

try:
    stock_library("transformers")
    stock_library("timm")
except LibraryError as error:
    pytest.skip(str(error), allow_module_level=True)

CPU = torch.device("cpu")
PARTS = ("connector", "language_model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    language_model_folder(root / "lm")
    caption_file(root / "captions.json", write_images(root / "images", 12))
    return root


def new_model(folder: Path) -> Assembled:
    return assemble(Recipe(ENCODER, str(folder / "lm"), 2, 64, "crop"), CPU)


def texts(folder: Path, assembled: Assembled, images: str = "images") -> CaptionTexts:
    return CaptionTexts.of(open_captioned([folder / "captions.json"], folder / images), assembled.builder, "")


def trained(folder: Path, **fields: Any) -> Callable[..., tuple[torch.Tensor, list[float], list[str]]]:
    """Return a function that trains a model and returns its connector, the curve and answers; for any rank."""
    config = FitConfig(**{"steps": 4, "batch_size": 8, "lr": 1e-3, "log_interval": 1, **fields})

    def run(*_rank: int) -> tuple[torch.Tensor, list[float], list[str]]:
        with replicas_of_launcher() as replicas:
            assembled = new_model(folder)
            data = texts(folder, assembled)
            curve = train_parts(assembled, PARTS, data, config, replicas)  # type: ignore[arg-type]
            prompt = assembled.builder.build([Piece("<image>")], 1)
            answers = answer_prompts(
                assembled, [(prompt, (n,)) for n in range(7)], data.images, Generation(5), replicas, batch_size=3
            )
        return assembled.model.connector[0].weight.detach(), list(curve.losses), answers

    return run


def test_two_ranks_and_micro_batches_learn_the_same(folder: Path) -> None:
    weight, losses, answers = trained(folder)()
    assert losses[-1] < losses[0]
    for run in ([trained(folder, micro_batch_size=3)()], run_distributed(trained(folder), 2)):
        for other_weight, other_losses, other_answers in run:
            torch.testing.assert_close(other_weight, weight, rtol=1e-4, atol=1e-5)
            assert other_losses == pytest.approx(losses, rel=1e-5)
            assert other_answers == answers
    assert len(answers) == 7


def test_every_caption_of_an_image_is_a_text_of_its_own(folder: Path) -> None:
    assembled = new_model(folder)
    data = texts(folder, assembled)
    assert len(data) == 24
    assert [data.image_numbers(index) for index in (0, 1, 2, 23)] == [(0,), (0,), (1,), (11,)]
    decoded = [assembled.tokenizer.decode(data.sequence(index).ids[2:]) for index in (0, 1, 22, 23)]
    assert decoded == [
        "a red picture</s>",
        "a picture that is red</s>",
        "a white picture</s>",
        "a picture that is white</s>",
    ]
    prompted = CaptionTexts.of(data.data, assembled.builder, "It shows").sequence(0)
    assert assembled.tokenizer.decode(prompted.ids[2:]) == "It shows a red picture</s>"
    assert prompted.num_targets == len(assembled.tokenizer.encode(" a red picture", add_special_tokens=False)) + 1


def test_a_damaged_image_is_not_learnt_and_a_missing_one_is_an_error(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("0000.png", "0001.png"):
        (tmp_path / "images" / name).write_bytes(b"<html>")
    with replicas_of_launcher() as replicas:
        assembled = new_model(tmp_path)
        data = texts(tmp_path, assembled)
        config = FitConfig(steps=1, batch_size=24, lr=1e-3)
        (loss,) = train_parts(assembled, PARTS, data, config, replicas).losses  # type: ignore[arg-type]
        kept = new_model(tmp_path)
        rest = texts(tmp_path, kept)
        kept_sequences = [rest.sequence(index) for index in range(4, 24)]
        numbers = np.array([rest.image_numbers(index)[0] for index in range(4, 24)])
        total, weight = kept.model.loss_sum(collate(kept_sequences, pixel_reader(kept, rest.images)(numbers)))
        assert loss == pytest.approx(float(total) / weight, rel=1e-5)
        # However the batch is divided, also where a part has damaged images only.
        config = FitConfig(steps=1, batch_size=24, lr=1e-3, micro_batch_size=1)
        (by_one,) = train_parts(new_model(tmp_path), PARTS, data, config, replicas).losses  # type: ignore[arg-type]
        assert by_one == pytest.approx(loss, rel=1e-5)
        prompt = assembled.builder.build([Piece("<image>")], 1)
        images = FolderImages(tmp_path / "images", ["0000.png"])
        with pytest.raises(DataError, match="0000.png"):
            answer_prompts(assembled, [(prompt, (0,))], images, Generation(2), replicas, batch_size=1)


def test_a_text_that_is_cut_off_loses_its_images_too(folder: Path) -> None:
    assembled = assemble(Recipe(ENCODER, str(folder / "lm"), 2, 10, "crop"), CPU)

    class TwoImages(CaptionTexts):
        def image_numbers(self, index: int) -> tuple[int, ...]:
            return (0, 1)

        def sequence(self, index: int) -> TokenSequence:
            pieces = [Piece("<image>"), Piece("ab", is_target=True), Piece("xyz" * 9 + "<image>")]
            return self.builder.build(pieces, 2)

    data = TwoImages.of(open_captioned([folder / "captions.json"], folder / "images"), assembled.builder, "")
    assert data.sequence(0).num_images == 1
    with replicas_of_launcher() as replicas:
        config = FitConfig(steps=1, batch_size=2, lr=1e-3)
        curve = train_parts(assembled, ("connector",), data, config, replicas)
    assert curve.losses[0] > 0
