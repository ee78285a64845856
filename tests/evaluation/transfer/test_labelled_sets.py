"""Labelled sets. Oracles: the images and classes that the test wrote, the same in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcl_megatron.evaluation.transfer.image_sets import DataError
from lcl_megatron.evaluation.transfer.labelled_sets import LabelledSet, _class_order, open_labelled, open_split
from tests.evaluation.transfer.small_sets import COLOURS, picture, write_folders, write_tar


def contents(split: LabelledSet) -> list[tuple[bytes, str]]:
    return [(split.images.read(i), split.classes[label]) for i, label in enumerate(split.labels.tolist())]


def test_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path, "train", 3)
    write_folders(tmp_path, "val", 2)
    (tmp_path / "train" / "red" / "notes.txt").write_text("no image")
    train, test = open_labelled(tmp_path, "train", "val")
    assert train.classes == test.classes == ("blue", "green", "red")
    assert contents(train) == [(picture(colour, number), colour) for colour in COLOURS for number in range(3)]
    assert contents(test)[-1] == (picture("red", 1001), "red")
    assert train.source.endswith("/train")


def test_classes_are_numbered_over_both_splits(tmp_path: Path) -> None:
    write_folders(tmp_path, "train", 1)
    (tmp_path / "val" / "red").mkdir(parents=True)
    (tmp_path / "val" / "red" / "a.PNG").write_bytes(picture("red", 7))
    train, test = open_labelled(tmp_path, "train", "val")
    assert test.labels.tolist() == [train.classes.index("red")] == [2]


@pytest.mark.parametrize("inner", ["{}-0000.tar", "{}/0000.tar"])
def test_webdataset_tars(tmp_path: Path, inner: str) -> None:
    for split, count in (("train", 12), ("val", 2)):
        members = []
        for number in range(count):
            members += [(f"{number}.png", picture("red", number)), (f"{number}.cls", b"%d\n" % (number % 11))]
        write_tar(tmp_path / inner.format(split), [*members, ("README", b"text")])
    train, test = open_labelled(tmp_path, "train", "val")
    assert train.classes == tuple(map(str, range(11)))
    assert contents(train) == [(picture("red", number), str(number % 11)) for number in range(12)]
    assert contents(test)[1] == (picture("red", 1), "1")


def test_labels_csv(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "red")):
        (tmp_path / "images" / name).write_bytes(picture(colour, 1))
    (tmp_path / "labels.csv").write_text("image_name,split,label\na.png,fit,red\nb.png,fit,blue\nc.png,test,red\n")
    train, test = open_labelled(tmp_path, "fit", "test")
    assert contents(train) == [(picture("red", 1), "red"), (picture("blue", 1), "blue")]
    assert contents(test) == [(picture("red", 1), "red")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", b"x")], r"train\.tar: sample '0' has no class \(\.cls\); expected KEY\.jpg and KEY\.cls"),
        ([("0.cls", b"1")], r"train\.tar: sample '0' has no image"),
        ([("0.png", b"x"), ("0.cls", b"cat")], r"train\.tar: 0\.cls holds b'cat'; expected a class number from 0"),
        ([("0.png", b"x"), ("0.cls", b"-1")], r"0\.cls holds b'-1'; expected a class number from 0"),
        ([], r"the 1 tars train\*\.tar of .* hold no samples"),
    ],
)
def test_bad_tars_are_explained(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "train.tar", members)
    with pytest.raises(DataError, match=message):
        open_split(tmp_path, "train")


def test_missing_data_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data folder"):
        open_split(tmp_path / "nowhere", "train")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"has no split 'train': expected a folder train/CLASS/.* found other"):
        open_split(tmp_path, "train")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train has no images in class folders; expected train/CLASS/\*\.jpg"):
        open_split(tmp_path, "train")
    write_folders(tmp_path, "val", 1)
    (tmp_path / "train" / "red").mkdir()
    (tmp_path / "train" / "red" / "a.png").write_bytes(picture("red", 1))
    with pytest.raises(DataError, match="/val has 2 classes that .*/train lacks, e.g. blue"):
        open_labelled(tmp_path, "train", "val")


def test_a_class_without_training_images_is_explained_in_every_layout(tmp_path: Path) -> None:
    rows = ["a.png,train,cat", "b.png,train,dog", "c.png,val,cat", "d.png,val,emu"]
    (tmp_path / "labels.csv").write_text("\n".join(["image_name,split,label", *rows]) + "\n")
    with pytest.raises(DataError, match="/val has 1 classes that .*/train lacks, e.g. emu; they could never be found"):
        open_labelled(tmp_path, "train", "val")
    for split, numbers in (("train", (0, 2)), ("val", (0, 1))):
        members = [(f"{n}{end}", data) for n in numbers for end, data in ((".png", b"x"), (".cls", b"%d" % n))]
        write_tar(tmp_path / "tars" / f"{split}.tar", members)
    with pytest.raises(DataError, match="/val has 1 classes that .*/train lacks, e.g. 1;"):
        open_labelled(tmp_path / "tars", "train", "val")


def test_numbers_of_equal_value_are_ordered_by_their_digits() -> None:
    assert [sorted(names, key=_class_order) for names in (("1", "01", "x"), ("01", "x", "1"))] == [["x", "01", "1"]] * 2
