"""Oracles: the scorer on the written predictions; a model that can see only colours must learn to say them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library
from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.captioning.annotations import CaptionedImage, read_caption_test_set
from lcl_megatron.evaluation.captioning.scores import score_captions
from lcl_megatron.evaluation.captioning.task import CaptioningSettings, open_caption_test, score_test
from lcl_megatron.evaluation.flags import TransferFlags
from lcl_megatron.evaluation.generation_commands import captioning, captioning_score
from lcl_megatron.evaluation.transfer.image_sets import DataError
from lcl_megatron.evaluation.transfer.results import read_json
from lcl_megatron.evaluation.transfer.settings import read_settings
from tests.evaluation.vision_language.small_data import (
    ENCODER,
    caption_file,
    language_model_folder,
    write_images,
    write_json,
)

pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
try:
    stock_library("transformers")
    stock_library("timm")
except LibraryError as error:
    pytest.skip(str(error), allow_module_level=True)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer needs java")

QUICK = (
    "fit.steps=80", "fit.batch_size=16", "fit.lr=0.01", "fit.warmup_steps=10", "max_length=64", "max_new_tokens=20",
    "num_beams=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captions")
    language_model_folder(root / "lm")
    images = write_images(root / "images", 28)
    caption_file(root / "train.json", images[:20])
    caption_file(root / "test.json", images[20:])
    return root


def flags(output: Path, **others: object) -> TransferFlags:
    return TransferFlags(encoder=(ENCODER,), output=output, preset="cpu", set=QUICK, **others)  # type: ignore[arg-type]


@needs_java
def test_a_model_learns_to_say_what_it_sees(folder: Path, tmp_path: Path) -> None:
    captioning(
        flags(tmp_path / "out"), str(folder / "lm"), (folder / "train.json",), (folder / "test.json",),
        (folder / "images",), folder / "images",
    )  # fmt: skip
    (result,) = read_json(tmp_path / "out")
    entries = read_caption_test_set(folder / "test.json")
    written = tmp_path / "out" / "predictions" / "captioning-tiny-frozen-seed0-test.json"
    captions = [record["caption"] for record in json.loads(written.read_text())]
    scores = score_captions(captions, [entry.captions for entry in entries])
    metrics = {metric.name: metric for metric in result.metrics}
    assert list(metrics) == ["CIDEr", "BLEU-4", "BLEU-3", "BLEU-2", "BLEU-1"]
    for name, metric in metrics.items():
        assert metric.mean == pytest.approx(100 * scores.values[name], abs=1e-6)
        assert metric.interval_examples is not None
    chance = metrics["CIDEr"].chance
    assert chance is not None
    assert metrics["CIDEr"].mean > chance + 50
    assert result.data["test"] == "test"

    model = tmp_path / "out" / "models" / "captioning-tiny-frozen-seed0"
    captioning_score(
        (model,), (folder / "test.json",), (folder / "images",), tmp_path / "again", preset="cpu", set=QUICK
    )
    (again,) = read_json(tmp_path / "again")
    assert again.metrics[0].mean == metrics["CIDEr"].mean


@needs_java
def test_domains_are_scored_as_sets_of_their_own() -> None:
    captions = ["a red bus", "a blue cat", "a dog", "two men"]
    domains = ["in-domain", "out-domain", "in-domain", "out-domain"]
    entries = [
        CaptionedImage(number, "x", (f"{caption} there", caption), domain)
        for number, (caption, domain) in enumerate(zip(captions, domains, strict=True))
    ]
    scored = score_test(entries, captions)
    assert list(scored.scores) == ["", "in-domain", "out-domain"]
    alone = score_captions([captions[0], captions[2]], [entries[0].captions, entries[2].captions])
    assert scored.scores["in-domain"].values == alone.values
    assert scored.chance["CIDEr"] < scored.scores[""].values["CIDEr"]


def test_parts_that_are_trained() -> None:
    settings = read_settings(CaptioningSettings, "captioning", "cpu")
    assert settings.parts("frozen") == ("connector", "language_model")
    assert settings.parts("full") == ("connector", "language_model", "encoder")
    assert dataclasses.replace(settings, train_language_model=False).parts("frozen") == ("connector",)


def test_paper_preset_is_table_8() -> None:
    settings = read_settings(CaptioningSettings, "captioning", "paper")
    fit = settings.fit
    assert (fit.steps, fit.batch_size, fit.lr, fit.warmup_steps, fit.weight_decay) == (20000, 512, 1e-4, 1000, 1e-4)
    assert settings.drop_path_rate == 0.2


def test_missing_images_are_named_before_anything_is_trained(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images" / "0021.png").unlink()
    with pytest.raises(DataError, match="1 of 8 images are not in .*, the first is 0021.png"):
        open_caption_test(folder / "test.json", tmp_path / "images")


@pytest.mark.parametrize(
    ("test", "images", "message"),
    [
        ((), ("i",), "--test is empty"),
        (("a.json",), ("i", "j"), "--test-images has 2 folders for 1 test sets; give one for each, or one for all"),
        (("a/x.json", "b/x.json"), ("i",), "files of the same name cannot be told apart"),
    ],
)
def test_flags_that_do_not_fit(test: tuple[str, ...], images: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        captioning_score((tmp_path,), tuple(map(Path, test)), tuple(map(Path, images)), tmp_path / "out", preset="cpu")


def test_results_of_several_test_sets_and_numbers_of_pairs(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "test.json").read_text())
    other = write_json(tmp_path / "other.json", content[:3])
    tests = [open_caption_test(path, folder / "images") for path in (folder / "test.json", other)]
    assert [(test.name, len(test.images)) for test in tests] == [("test", 8), ("other", 3)]
    assert np.array_equal([entry.image_id for entry in tests[1].entries], [20, 21, 22])


@needs_java
def test_chance_is_of_other_images_only() -> None:
    captions = ["one red cat sleeps", "two blue dogs bark", "five green birds sing", "nine old men walk"]
    entries = [CaptionedImage(number, f"{number}.png", (caption,)) for number, caption in enumerate(captions)]
    scored = score_test(entries, captions)
    assert scored.scores[""].values["BLEU-1"] == pytest.approx(1)
    assert scored.chance["CIDEr"] == pytest.approx(0, abs=1e-9)
    assert scored.chance["BLEU-1"] == pytest.approx(0, abs=1e-9)
