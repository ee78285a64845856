"""Zero-shot classification.

Oracles: a model whose features the test chooses; for a checkpoint, the training model's own context features of the
same tokens in front of a real image, and its pooled latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcl_megatron.checkpoint.manifest import CheckpointError
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.evaluation.encoders.preprocessing import Preprocessing
from lcl_megatron.evaluation.transfer.image_sets import DataError
from lcl_megatron.evaluation.transfer.labelled_sets import open_split
from lcl_megatron.evaluation.zero_shot.checkpoint_model import checkpoint_model, prompt_batch
from lcl_megatron.evaluation.zero_shot.task import read_class_names, zero_shot
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from
from tests.evaluation.transfer.small_sets import COLOURS, SIZE, write_folders
from tests.training.small_runs import IMAGE_SIZE, DataFolder, plain_document, sentence, small_config


class ColourModel:
    """Images are their mean colour; a prompt is the colour it names, doubled, or with ``wrong``, the next one's."""

    image_size = SIZE

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong
        self.prompts: list[str] = []

    def preprocess(self, data: bytes) -> Tensor:
        return Preprocessing(SIZE, SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(data)

    def embed_images(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean(dim=(2, 3)) - 90

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        self.prompts += prompts
        names = list(COLOURS)
        found = [next(index for index, name in enumerate(names) if name in prompt) for prompt in prompts]
        shifted = [names[(index + self.wrong) % len(names)] for index in found]
        return 2 * torch.tensor([COLOURS[name] for name in shifted]).float() - 180

    def describe(self) -> dict[str, Any]:
        return {"name": "colours"}


def test_images_belong_to_the_most_similar_prompt(tmp_path: Path) -> None:
    write_folders(tmp_path, "val", 4)
    test = open_split(tmp_path, "val")
    model = ColourModel()
    result = zero_shot(model, test, test.classes, ["a {} thing", "{}!"])
    (top1,) = result.metrics
    assert (top1.mean, top1.chance) == (1.0, pytest.approx(1 / 3))
    assert model.prompts == [text for name in ("blue", "green", "red") for text in (f"a {name} thing", f"{name}!")]
    assert zero_shot(ColourModel(wrong=True), test, test.classes, ["{}"]).metrics[0].mean == 0.0
    with pytest.raises(DataError, match="each needs {} where the name of the class stands"):
        zero_shot(model, test, test.classes, ["a thing"])


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Diverged(ColourModel):
        def embed_images(self, pixels: Tensor) -> Tensor:
            return super().embed_images(pixels) * float("nan")

    write_folders(tmp_path, "val", 1)
    test = open_split(tmp_path, "val")
    with pytest.raises(ValueError, match="colours: features are not finite, so that no class is the most similar"):
        zero_shot(Diverged(), test, test.classes, ["{}"])


def test_class_names_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("sky\ngrass\n\nrose \n")
    assert read_class_names(file, 3) == ("sky", "grass", "rose")
    with pytest.raises(DataError, match=r"names\.txt has 3 names for 4 classes"):
        read_class_names(file, 4)
    with pytest.raises(DataError, match="there is no file of class names"):
        read_class_names(tmp_path / "nowhere", 4)


def with_image(tokens: list[int], image_id: int, num_patches: int, image: Tensor) -> PackedBatch:
    """Return one document of tokens that end with ``<BoI>``, and an image behind it."""
    row = torch.tensor([[*tokens, *[image_id] * num_patches]])
    none = torch.zeros(0, dtype=torch.int64)
    return PackedBatch(
        tokens=row, labels=torch.zeros_like(row), loss_mask=torch.zeros_like(row, dtype=torch.bool),
        position_ids=torch.arange(row.shape[1])[None], cu_seqlens=torch.tensor([0, row.shape[1]], dtype=torch.int32),
        max_seqlen=row.shape[1], label_positions=none, image_slots=torch.tensor([len(tokens)]),
        context_slots=torch.tensor([len(tokens) - 1]), has_context=torch.tensor([True]),
        image_keys=torch.tensor([1]), image_ok=torch.tensor([True]), images=image, num_images=1,
    )  # fmt: skip


def test_a_checkpoint_s_features_are_those_that_training_contrasts(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(12)])
    data.preprocess()
    config = small_config(data.corpus, checkpoint={"save": str(tmp_path / "save")}, training={"train_iters": 3})
    image = torch.randint(0, 256, (1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    prompts = [sentence(3), "the cat", sentence(7)]
    with run_from(config) as run:
        train(run)
        run.engine.eval()
        model: Any = run.engine.model

    with checkpoint_model(tmp_path / "save") as found:
        special, tokenizer = found.tokenizer.special_tokens, found.tokenizer
        contexts = found.embed_prompts(prompts)
        pooled = found.embed_images(image)
        assert found.describe()["name"].startswith("save/step-")
        for prompt, context in zip(prompts, contexts, strict=True):
            tokens = [special.bos, *tokenizer.encode(prompt), special.boi]
            with torch.no_grad():
                output = model(with_image(tokens, special.image, config.vision.num_patches, image))
            torch.testing.assert_close(context, output.context_ND[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pooled, output.pooled_ND, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="1 prompts, the longest of .* tokens; expected 1 to 64 tokens"):
            found.embed_prompts(["the cat " * 60])
        with pytest.raises(ValueError, match="0 prompts"):
            prompt_batch(tokenizer, [], 64)

    with pytest.raises(CheckpointError, match="no complete checkpoint"), checkpoint_model(tmp_path / "data"):
        pass
