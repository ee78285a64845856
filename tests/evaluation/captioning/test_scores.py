"""Oracle: the COCO caption evaluation itself, ``pycocoevalcap.eval.COCOEvalCap``, run on a file of predictions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lcl_megatron.evaluation.captioning import scores
from lcl_megatron.evaluation.captioning.annotations import read_caption_test_set
from lcl_megatron.evaluation.captioning.predictions import write_predictions
from lcl_megatron.evaluation.captioning.scores import BLEU, CIDER, CaptionScoreError, score_captions

evaluation = pytest.importorskip("pycocoevalcap.eval", reason="pycocoevalcap is not installed")
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the tokenizer needs java")

REFERENCES = [
    ["A cat sits on the mat.", "A cat, sitting on a mat", 'The "cat" is on its mat!'],
    ["Two dogs run in a park.", "dogs running on the grass", "Some dogs playing"],
    ["A man's surfboard lies on the beach", "a surfboard at the sea (red)"],
    ["A red bus drives down the street.", "The bus is red", "A double-decker bus in the city"],
    ["A plate of food on a table", "some food on a plate"],
]
PREDICTIONS = [
    "a cat on the mat",
    "A man with a surfboard.",
    "",
    "a red bus in the street of the city",
    "a plate\nof food",
]


def coco_json(references: list[list[str]]) -> dict[str, Any]:
    captions = [(image, caption) for image, of_image in enumerate(references) for caption in of_image]
    return {
        "info": {},
        "images": [{"id": 10 + image, "file_name": f"{image}.jpg"} for image in range(len(references))],
        "annotations": [
            {"id": number, "image_id": 10 + image, "caption": caption}
            for number, (image, caption) in enumerate(captions)
        ],
    }


class NotCompared:
    """Stands in for METEOR and SPICE, which the evaluation runs along and which need downloads or minutes."""

    def compute_score(self, gts: dict[Any, Any], _res: Any) -> tuple[float, list[float]]:
        return 0.0, [0.0] * len(gts)

    def method(self) -> str:
        return "none"


def official(annotations: Path, predictions: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the evaluation as its example does."""
    coco_module = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    monkeypatch.setattr(evaluation, "Meteor", NotCompared)
    monkeypatch.setattr(evaluation, "Spice", NotCompared)
    coco = coco_module.COCO(str(annotations))
    run = evaluation.COCOEvalCap(coco, coco.loadRes(str(predictions)))
    run.evaluate()
    return run


@needs_java
def test_scores_equal_the_official_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "captions.json").write_text(json.dumps(coco_json(REFERENCES)))
    images = read_caption_test_set(tmp_path / "captions.json")
    write_predictions(images, PREDICTIONS, tmp_path / "predictions.json")
    expected = official(tmp_path / "captions.json", tmp_path / "predictions.json", monkeypatch)
    found = score_captions(PREDICTIONS, [image.captions for image in images])
    assert found.values[CIDER] == pytest.approx(expected.eval["CIDEr"], abs=1e-6)
    for n, name in enumerate(BLEU, start=1):
        assert found.values[name] == pytest.approx(expected.eval[f"Bleu_{n}"], abs=1e-6)
    assert 0.1 < found.values["BLEU-4"] < 0.9
    per_image = [expected.imgToEval[image.image_id]["CIDEr"] for image in images]
    assert found.cider == pytest.approx(per_image, abs=1e-6)


@needs_java
def test_genuine_captions(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_data / "upstream_samples" / "coco" / "annotations" / "captions_val2017_mini.json"
    images = read_caption_test_set(path)
    # The first reference as a prediction: far above 0, and not perfect in the mean over references.
    predictions = [image.captions[0] for image in images]
    write_predictions(images, predictions, tmp_path / "predictions.json")
    expected = official(path, tmp_path / "predictions.json", monkeypatch)
    found = score_captions(predictions, [image.captions for image in images])
    assert found.values[CIDER] == pytest.approx(expected.eval["CIDEr"], abs=1e-6)
    assert found.values["BLEU-4"] == pytest.approx(expected.eval["Bleu_4"], abs=1e-6)


@needs_java
def test_all_images_once_is_the_score_and_a_part_is_its_own_set() -> None:
    found = score_captions(PREDICTIONS, REFERENCES)
    for name, value in found.values.items():
        assert found.resampled(name, np.arange(5)) == pytest.approx(value, abs=1e-12)
    part = score_captions(
        [PREDICTIONS[0], PREDICTIONS[3], PREDICTIONS[3]], [REFERENCES[0], REFERENCES[3], REFERENCES[3]]
    )
    for name in BLEU:
        assert found.resampled(name, np.array([0, 3, 3])) == pytest.approx(part.values[name], abs=1e-12)
    assert found.resampled(CIDER, np.array([1, 1])) == pytest.approx(found.cider[1])


@needs_java
def test_a_line_end_in_a_caption_does_not_shift_the_others() -> None:
    clean = score_captions(["a cat on the mat", "dogs run"], REFERENCES[:2])
    odd = score_captions(["a cat\u2028on\r the\x0bmat", "dogs run"], REFERENCES[:2])
    assert odd.values == clean.values


def test_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CaptionScoreError, match="there is no java, .* install a Java runtime"):
        score_captions(["a cat"], [["a cat"]])


def test_without_the_scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.eval", None)
    with pytest.raises(CaptionScoreError, match=r"pip install 'lcl_megatron\[eval\]'"):
        scores.check_scorer()


@needs_java
@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_every_image_needs_both(predictions: list[str], references: list[list[str]]) -> None:
    with pytest.raises(CaptionScoreError, match="every image needs a caption and a reference"):
        score_captions(predictions, references)


@needs_java
def test_a_tokenizer_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CaptionScoreError, match="returned 1 captions for 2; run java -version"):
        score_captions(["a"], [["a", "b"]])
