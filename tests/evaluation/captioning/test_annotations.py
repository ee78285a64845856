"""Oracle: the same two images in each of the forms that are in use, written by hand; genuine files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.captioning.annotations import CaptionedImage, read_caption_test_set
from lcl_megatron.evaluation.captioning.predictions import write_predictions
from lcl_megatron.evaluation.transfer.image_sets import DataError

IMAGES = [
    CaptionedImage(7, "val2014/COCO_val2014_000000000007.jpg", ("A cat.", "One cat")),
    CaptionedImage(12, "val2014/COCO_val2014_000000000012.jpg", ("A dog.",)),
]


CAPTION = {"image_id": 1, "caption": "x"}


def karpathy() -> dict[str, Any]:
    def entry(image: CaptionedImage, split: str) -> dict[str, Any]:
        folder, name = image.name.split("/")
        sentences = [{"raw": caption, "tokens": []} for caption in image.captions]
        return {"filepath": folder, "filename": name, "cocoid": image.image_id, "split": split, "sentences": sentences}

    other = CaptionedImage(1, "train2014/COCO_train2014_000000000001.jpg", ("x",))
    return {"dataset": "coco", "images": [entry(IMAGES[0], "test"), entry(other, "train"), entry(IMAGES[1], "test")]}


def listed(with_ids: bool) -> list[dict[str, Any]]:
    ids = [{"image_id": image.image_id} if with_ids else {} for image in IMAGES]
    return [
        {"image": image.name, "caption": list(image.captions), **identity}
        for image, identity in zip(IMAGES, ids, strict=True)
    ]


def annotated() -> dict[str, Any]:
    return {
        "images": [{"id": image.image_id, "file_name": image.name} for image in IMAGES],
        "annotations": [
            {"id": number, "image_id": image.image_id, "caption": caption}
            for image in reversed(IMAGES)
            for number, caption in enumerate(image.captions)
        ],
    }


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("content", [karpathy(), listed(True), listed(False), annotated()])
def test_all_forms_say_the_same(tmp_path: Path, content: Any) -> None:
    assert read_caption_test_set(write(tmp_path, content)) == IMAGES


def test_nocaps(tmp_path: Path) -> None:
    content = annotated()
    for image, domain in zip(content["images"], ("near-domain", "out-domain"), strict=True):
        image |= {"domain": domain, "open_images_id": "0013ea2087020901", "coco_url": "https://example.org/7.jpg"}
    images = read_caption_test_set(write(tmp_path, content))
    assert [image.domain for image in images] == ["near-domain", "out-domain"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "captions.json is not a JSON file"),
        ("5", "captions.json holds int; expected COCO's images and annotations, or a list of images"),
        ([], "captions.json has no captions of split 'test'; check the file and the split"),
        ([3], "captions.json:1: wrong type: entry 0 is int.*; a test set is scored whole"),
        ([{"image": "a.jpg", "caption": ["x"]}], "entry 0 has no image_id, and a.jpg does not end in a number"),
        ([{"image": "a1.jpg", "caption": []}], "captions.json:1: no caption: of 'a1.jpg'"),
        ([{"image": "a1.jpg", "caption": ["x", " "]}], "captions.json:2: no caption: of 'a1.jpg'"),
        ([{"image": "1.jpg", "caption": "x"}, {"image": "b/1.jpg", "caption": "y"}], "image 1 comes twice"),
        ([{"image": "1.jpg", "image_id": n, "caption": "x"} for n in range(2)], "image 1.jpg comes twice"),
        ({"images": [{"id": 1, "file_name": "a"}], "annotations": []}, "no caption: image 1 has no annotation"),
        ({"images": [{"id": 1, "file_name": "a"}, 3], "annotations": [CAPTION]}, r"images\[1\] is int"),
        ({"images": [], "annotations": [CAPTION]}, r"annotations\[0\].image_id is 1, which has no file_name in images"),
        ({"images": [{"id": 1, "file_name": "a"}], "annotations": [CAPTION, 3]}, r"annotations\[1\] is int"),
        ({"images": [{"filename": "a", "split": "test", "sentences": ["x"]}]}, r"images\[0\] has no imgid"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises((DataError, ConfigError, OSError), match=message):
        read_caption_test_set(write(tmp_path, content))


def test_missing_file_and_file_without_ids(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no caption file .*captions.json; give a .json"):
        read_caption_test_set(tmp_path / "captions.json")
    with pytest.raises(DataError, match="captions.tsv is no .json file; captions are predicted for images with ids"):
        read_caption_test_set(tmp_path / "captions.tsv")


def test_predictions_are_written_as_coco_results(tmp_path: Path) -> None:
    path = tmp_path / "new" / "predictions.json"
    write_predictions(IMAGES, ["a cat", "a dog"], path)
    records = json.loads(path.read_text())
    assert records == [{"image_id": 7, "caption": "a cat"}, {"image_id": 12, "caption": "a dog"}]


def test_genuine_files(shared_data: Path) -> None:
    folder = shared_data / "upstream_samples" / "coco"
    assert len(read_caption_test_set(folder / "coco_mini_karpathy_style.json")) == 51
    assert len(read_caption_test_set(folder / "annotations" / "captions_val2017_mini.json")) == 79
    images = read_caption_test_set(shared_data / "labelled" / "cifar10" / "captions" / "captions_dev_test_coco.json")
    assert (len(images), len(images[0].captions)) == (1000, 5)
