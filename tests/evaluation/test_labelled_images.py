"""Labelled images.

Oracles: the rows and pixels that the test itself wrote, and Pillow's resize and crop.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_megatron.evaluation.features import extract_features
from lcl_megatron.evaluation.labelled_images import DecodedImages, LabelError, LabelledImages, read_labels
from lcl_megatron.evaluation.transfer.image_sets import DataError

ROWS = [
    ("c.png", "test", "cat"),
    ("sub/a.png", "train", "dog"),
    ("b.png", "train", "ant"),
    ("d.png", "train", "dog"),
]


def write_csv(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_set(folder: Path) -> Path:
    """Write four plain images of distinct colours and sizes with their labels.csv, and return the folder."""
    for index, (name, _, _) in enumerate(ROWS):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + index, 30), (10 * index, 20 * index, 60)).save(path)
    write_csv(folder / "labels.csv", ["image_name,split,label,other", *(",".join(row) + ",x" for row in ROWS)])
    return folder


def test_split_keeps_file_order_and_classes_are_numbered_over_all_splits(tmp_path: Path) -> None:
    train = read_labels(write_set(tmp_path) / "labels.csv", "train")
    assert train.names == ("sub/a.png", "b.png", "d.png")
    assert train.classes == ("ant", "cat", "dog")
    np.testing.assert_array_equal(train.labels, [2, 0, 2])
    assert train.labels.dtype == np.int64

    test = read_labels(tmp_path / "labels.csv", "test")
    assert test.classes == train.classes
    np.testing.assert_array_equal(test.labels, [1])


def test_limit_takes_the_first_images(tmp_path: Path) -> None:
    assert read_labels(write_set(tmp_path) / "labels.csv", "train", limit=2).names == ("sub/a.png", "b.png")


def test_byte_order_mark_and_quoted_fields_are_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b'\xef\xbb\xbfimage_name,split,label\r\n"a, b.png",train,"fire truck"\r\n')
    images = read_labels(path, "train")
    assert images.names == ("a, b.png",)
    assert images.classes == ("fire truck",)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image_name,label", "a.png,cat"], ":1: no column split; found image_name, label, expected"),
        ([""], ":1: no column image_name, split, label"),
        (["image_name,split,label", "a.png,train,cat", "b.png,train"], ":3: label is empty"),
        (["image_name,split,label", "a.png, ,cat"], ":2: split is empty"),
        (["image_name,split,label", "a.png,train,cat", "a.png,test,cat"], ":3: a.png was already on line 2"),
        (["image_name,split,label", "../a.png,train,cat"], ":2: unsafe image name"),
        (["image_name,split,label", "a.png,dev,cat"], r"no image in split 'train'; splits: \['dev'\]"),
    ],
)
def test_malformed_labels_are_refused_with_file_and_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(LabelError, match="labels.csv" + message if message[0] == ":" else message):
        read_labels(write_csv(tmp_path / "labels.csv", lines), "train")


def test_labels_in_another_encoding_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b"image_name,split,label\na.png,train,caf\xe9\n")
    with pytest.raises(LabelError, match="UTF-8"):
        read_labels(path, "train")


def test_missing_labels_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="labels.csv"):
        read_labels(tmp_path / "labels.csv", "train")


def test_pixels_equal_pillows_resize_and_centre_crop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name, size in (("wide.png", (64, 40)), ("tall.png", (40, 90))):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        smooth.save(tmp_path / "images" / name)
    labelled = LabelledImages(("wide.png", "tall.png"), np.array([0, 1]), ("a", "b"))
    pixels = DecodedImages(labelled, tmp_path / "images", image_size=20)[0:2]
    assert pixels.shape == (2, 3, 20, 20)
    assert pixels.dtype == torch.uint8
    for name, ours, resized, left, top in (
        ("wide.png", pixels[0], (32, 20), 6, 0),
        ("tall.png", pixels[1], (20, 45), 0, 12),
    ):
        with Image.open(tmp_path / "images" / name) as image:
            theirs = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 20, top + 20))
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))
        assert difference.max() <= 2
        assert difference.mean() < 0.5


def test_features_follow_the_order_of_the_labels(tmp_path: Path) -> None:
    """The class can be read off the colour, so a wrong order would show."""
    folder = write_set(tmp_path)
    train = read_labels(folder / "labels.csv", "train")
    images = DecodedImages(train, folder / "images", image_size=8)
    features = extract_features(lambda pixels: pixels.float().mean(dim=(2, 3)), images, batch_size=2)
    torch.testing.assert_close(features, torch.tensor([[10.0, 20, 60], [20, 40, 60], [30, 60, 60]]))


def test_missing_files_are_counted_before_anything_is_decoded(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    train = read_labels(folder / "labels.csv", "train")
    (folder / "images" / "b.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are not in .*images, the first is b\.png"):
        DecodedImages(train, folder / "images", image_size=8)
    with pytest.raises(DataError, match="no image folder"):
        DecodedImages(train, folder / "nowhere", image_size=8)


def test_damaged_image_ends_the_evaluation_by_name(tmp_path: Path) -> None:
    folder = write_set(tmp_path)
    train = read_labels(folder / "labels.csv", "train")
    (folder / "images" / "b.png").write_bytes(b"<html>not found</html>")
    images = DecodedImages(train, folder / "images", image_size=8)
    with pytest.raises(DataError, match=r"b\.png: .*; repair the image or take it out of the set"):
        images[0:3]
    (folder / "images" / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.png: not an image"):
        images[0:3]
