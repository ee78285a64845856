"""The whole model in transformers. Oracle: the model itself, one greedy token after the other; the package's tokenizer
and its transform for evaluation.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from lcl_megatron.checkpoint.convert.export_targets import ExportSource
from lcl_megatron.checkpoint.export import export_weights
from lcl_megatron.checkpoint.export_check import Reference, document_batch, reference
from lcl_megatron.checkpoint.weights import ModelWeights
from lcl_megatron.config.image import CLIP_MEAN, CLIP_STD
from lcl_megatron.data.decoding.images import evaluation_image
from lcl_megatron.data.tokenizer import Tokenizer
from tests.checkpoint.random_weights import random_weights, tiny_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def weights(tokenizer: Tokenizer) -> ModelWeights:
    return random_weights(tiny_config(language={"vocab_size": tokenizer.vocab_size}), tokenizer=tokenizer.model)


@pytest.fixture(scope="module")
def export(weights: ModelWeights, transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "export"
    export_weights(weights, folder, include_whole_model=True)
    return folder


@pytest.fixture(scope="module")
def own(weights: ModelWeights) -> Iterator[Reference]:
    with reference(ExportSource(weights)) as model:
        yield model


@pytest.fixture(scope="module")
def whole(export: Path, transformers: ModuleType) -> Any:
    import lcl_megatron.hf

    model = transformers.AutoModelForCausalLM.from_pretrained(export / "lcl").eval()
    assert type(model) is lcl_megatron.hf.LCLForConditionalGeneration
    return model


def picture(seed: int) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((29, 23), Image.Resampling.BICUBIC)


@torch.no_grad()
def greedy(own: Reference, ids: list[int], images: Tensor, slots: list[int], count: int) -> list[int]:
    """Return what the model itself continues with."""
    ids = list(ids)
    for _ in range(count):
        batch = document_batch(torch.tensor([ids]), torch.tensor(slots, dtype=torch.int64), images)
        ids.append(int(own.logits(batch)[-1].argmax()))
    return ids


def test_generation_with_images_is_the_models_own(whole: Any, own: Reference, tokenizer: Tokenizer) -> None:
    special = tokenizer.special_tokens
    image = [special.boi, *[special.image] * 4, special.eoi]
    ids = [special.bos, *image, *tokenizer.encode("the cat"), *image, *tokenizer.encode("on")]
    slots = [index + 1 for index, token in enumerate(ids) if token == special.boi]
    expected = greedy(own, ids, own.images, slots, 12)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = whole.generate(torch.tensor([ids]), own.images, **settings)
    assert found.tolist() == [expected]
    others = whole.generate(torch.tensor([ids]), own.images.flip(0), **settings)
    assert others.tolist() != [expected], "the images make no difference"


def test_rows_may_be_padded_on_the_left(whole: Any, own: Reference, tokenizer: Tokenizer) -> None:
    special = tokenizer.special_tokens
    ids = [special.bos, special.boi, *[special.image] * 4, special.eoi, *tokenizer.encode("on")]
    longer = [special.bos, *tokenizer.encode("the cat sat on"), *ids[1:]]
    rows = torch.tensor([[special.pad] * (len(longer) - len(ids)) + ids, longer])
    mask = torch.ones_like(rows)
    mask[0, : len(longer) - len(ids)] = 0
    found = whole.generate(rows, own.images, mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for row, start, image in ((ids, len(longer) - len(ids), 0), (longer, 0, 1)):
        slot = row.index(special.boi) + 1
        expected = greedy(own, row, own.images[image : image + 1], [slot], 6)
        assert found[image, start:].tolist() == expected


@torch.no_grad()
def test_features_are_those_of_the_contrastive_loss(whole: Any, own: Reference, tokenizer: Tokenizer) -> None:
    batch = own.interleaved(tokenizer.special_tokens)
    pooled, context, _ = own.features(batch)
    assert (whole.encode_image(batch.images) - normalize(pooled, dim=-1)).abs().max() < 1e-6
    first = int(batch.context_slots[0])
    text = whole.encode_text(batch.tokens[:, : first + 1])
    assert (text - normalize(context[:1], dim=-1)).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"1 of 1 rows have no <BoI> \(id \d+\), at which a text is encoded"):
        whole.encode_text(batch.tokens[:, :first])


@torch.no_grad()
def test_processor_makes_ids_and_pixels_of_text_and_images(
    export: Path, transformers: Any, tokenizer: Tokenizer, whole: Any
) -> None:
    processor = transformers.AutoProcessor.from_pretrained(export / "lcl")
    pictures, special = [picture(1), picture(2)], tokenizer.special_tokens
    text = "<BoI><image><EoI>the cat<BoI><image><EoI>"
    inputs = processor(images=pictures, text=text, return_tensors="pt")
    image = [special.boi, *[special.image] * 4, special.eoi]
    assert inputs.input_ids.tolist() == [[special.bos, *image, *tokenizer.encode("the cat"), *image]]
    assert torch.isfinite(whole(**inputs).logits).all()
    out = whole.generate(**inputs, max_new_tokens=3)
    assert out.shape[0] == 1
    assert inputs.input_ids.shape[1] < out.shape[1] <= inputs.input_ids.shape[1] + 3


@pytest.mark.parametrize("folder", [".", "clip_vision"])
def test_image_processors_make_the_pixels_of_this_packages_evaluation(
    folder: str, export: Path, transformers: Any
) -> None:
    """But for the rounding of another resize: 2 of 255 grey levels where an image is enlarged."""
    processor = transformers.AutoImageProcessor.from_pretrained(export / folder)
    for seed, size in ((1, (29, 23)), (2, (64, 40)), (3, (13, 30))):
        image = picture(seed).resize(size)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        own = (evaluation_image(stream.getvalue(), 16).float() / 255 - mean) / std
        found = processor(image, return_tensors="pt")["pixel_values"][0]
        assert found.shape == own.shape
        assert ((found - own) * std).abs().max() <= 2.01 / 255


def test_images_that_do_not_fit_the_text_are_refused(whole: Any, own: Reference, tokenizer: Tokenizer) -> None:
    special = tokenizer.special_tokens
    ids = torch.tensor([[special.bos, special.boi, *[special.image] * 4, special.eoi]])
    with pytest.raises(ValueError, match=r"4 ids are the image token \d+, the images have 8 latents; give every image"):
        whole(ids, own.images)
    with pytest.raises(ValueError, match="4 ids are the image token .*, the images have 0 latents"):
        whole(ids)


@torch.no_grad()
def test_saved_again_it_is_the_same_model(
    whole: Any, own: Reference, tokenizer: Tokenizer, transformers: Any, tmp_path: Path
) -> None:
    whole.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    batch = own.interleaved(tokenizer.special_tokens)
    assert torch.equal(again(batch.tokens, batch.images).logits, whole(batch.tokens, batch.images).logits)
    assert torch.equal(again.encode_image(batch.images), whole.encode_image(batch.images))


def test_gradients_reach_every_part(whole: Any, own: Reference, tokenizer: Tokenizer) -> None:
    """To fine-tune it: all parameters but those that only the contrastive features read."""
    batch = own.interleaved(tokenizer.special_tokens)
    whole(batch.tokens, batch.images, labels=batch.tokens).loss.backward()
    without = {name for name, p in whole.named_parameters() if p.grad is None or not p.grad.any()}
    whole.zero_grad()
    contrast = ("context_", "logit_scale", "pool.query", "pool.key")
    assert {name for name in without if not name.startswith(contrast)} == set()


REMOTE = """
import sys
import torch
sys.path = [path for path in sys.path if path not in ("", sys.argv[2])]
if sys.argv[3] == "shim":
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.modules["lcl_megatron"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
inputs = torch.load(sys.argv[4], weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[4] + ".out")
"""


@torch.no_grad()
def test_shipped_code_runs_where_the_package_is_not_installed(
    export: Path, whole: Any, own: Reference, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    batch = own.interleaved(tokenizer.special_tokens)
    torch.save({"input_ids": batch.tokens, "pixel_values": batch.images}, tmp_path / "inputs")
    shim = "shim" if torch.version.cuda is None else "none"
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, str(export / "lcl"), str(ROOT), shim, str(tmp_path / "inputs")],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    logits = torch.load(tmp_path / "inputs.out", weights_only=True)
    assert torch.equal(logits, whole(batch.tokens, batch.images).logits)
    assert (export / "lcl" / "modeling_lcl.py").read_text() == (
        ROOT / "lcl_megatron" / "hf" / "modeling_lcl.py"
    ).read_text()


def test_generation_ends_at_the_end_of_a_document(
    whole: Any, export: Path, tokenizer: Tokenizer, transformers: Any
) -> None:
    special = tokenizer.special_tokens
    alone = transformers.OPTForCausalLM.from_pretrained(export / "language_model")
    for model in (whole.language_model, alone):
        settings = model.generation_config
        assert (settings.eos_token_id, settings.pad_token_id) == (special.eos, special.pad)
        assert model.config.bos_token_id == special.bos
