"""Images with classes, in the layouts that people have: ImageNet's folders, webdataset tars, or a ``labels.csv``.

::

    ROOT/train/n01440764/a.jpg  ROOT/val/n01440764/b.jpg        the folder of an image is its class
    ROOT/train-0000.tar  ROOT/val-0000.tar                      members KEY.jpg and KEY.cls, a class number in decimal
    ROOT/labels.csv  ROOT/images/a.jpg                          see evaluation/labelled_images.py
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lcl_megatron.data.image_stores.tar_members import IMAGE_EXTENSIONS, split_name, tar_members
from lcl_megatron.evaluation.labelled_images import read_labels
from lcl_megatron.evaluation.transfer.image_sets import DataError, FolderImages, ImageSet, TarImages

SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
"""Endings of image files, lower case."""


@dataclass(frozen=True)
class LabelledSet:
    """A split of images with a class each."""

    images: ImageSet
    """N images."""
    labels: np.ndarray
    """(N,) int64, index into ``classes``."""
    classes: tuple[str, ...]
    """Names, the same for all splits of a data set."""
    source: str
    """Data set and split, for messages and results."""

    def contents(self) -> tuple[object, ...]:
        """Return names of images, classes and labels: what makes it the set that it is."""
        names = [self.images.name(index) for index in range(len(self.images))]
        return self.source, names, self.labels.tolist(), self.classes


def open_labelled(root: Path, train_split: str, test_split: str) -> tuple[LabelledSet, LabelledSet]:
    """Return the two splits of a data set, whose layout its files show.

    Args:
        root: folder of the data set; see the module's text.
        train_split: name of the split to fit on: a folder, the beginning of tar names, or a value of ``split``.
        test_split: name of the split to score.

    Raises:
        DataError: nothing is there that is known, a split is missing or damaged, or the test set has a class that the
            training set lacks.
        LabelError: ``labels.csv`` is damaged.
        OSError: a tar is damaged.
    """
    train, test = open_split(root, train_split), open_split(root, test_split)
    classes = tuple(sorted({*train.classes, *test.classes}, key=_class_order))
    # Of labels.csv and tars every split has all classes, but not images of each.
    seen, asked = ({split.classes[label] for label in np.unique(split.labels)} for split in (train, test))
    if unknown := sorted(asked - seen):
        raise DataError(
            f"{test.source} has {len(unknown)} classes that {train.source} lacks, e.g. {unknown[0]}; they could never "
            "be found: give splits of one data set"
        )
    return _renumbered(train, classes), _renumbered(test, classes)


def open_split(root: Path, split: str) -> LabelledSet:
    """Return one split of a data set; see ``open_labelled``."""
    if not root.is_dir():
        raise DataError(f"there is no data folder {root}; give the folder of the labelled images")
    return _layout(root, split)(root, split)


def describe_splits(train: LabelledSet, test: LabelledSet) -> dict[str, Any]:
    """Return what results record of the data: both sources, their sizes, and the number of classes."""
    return {
        "train": train.source,
        "test": test.source,
        "train_images": len(train.images),
        "test_images": len(test.images),
        "classes": len(train.classes),
    }


def _layout(root: Path, split: str) -> Callable[[Path, str], LabelledSet]:
    if (root / "labels.csv").is_file():
        return read_csv_split
    if _tars(root, split):
        return read_tar_split
    if (root / split).is_dir():
        return read_folder_split
    found = sorted(path.name for path in root.iterdir())[:8]
    raise DataError(
        f"{root} has no split {split!r}: expected a folder {split}/CLASS/*.jpg, tars {split}*.tar, or labels.csv; "
        f"found {', '.join(found) or 'nothing'}"
    )


def read_folder_split(root: Path, split: str) -> LabelledSet:
    """Return ``root/split/CLASS/*``, classes and files in alphabetical order; raises ``DataError``."""
    folder = root / split
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    names: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        files = sorted(entry.name for entry in os.scandir(folder / name) if entry.name.lower().endswith(SUFFIXES))
        names += [f"{name}/{file}" for file in files]
        labels += [number] * len(files)
    if not names:
        raise DataError(f"{folder} has no images in class folders; expected {split}/CLASS/*.jpg (or png, webp, gif)")
    return LabelledSet(FolderImages(folder, names), np.array(labels, np.int64), tuple(classes), f"{root.name}/{split}")


def read_csv_split(root: Path, split: str) -> LabelledSet:
    """Return a split of ``root/labels.csv``, its images in ``root/images`` or else in ``root``; see ``read_labels``."""
    images = read_labels(root / "labels.csv", split)
    folder = root / "images" if (root / "images").is_dir() else root
    return LabelledSet(FolderImages(folder, images.names), images.labels, images.classes, f"{root.name}/{split}")


def read_tar_split(root: Path, split: str) -> LabelledSet:
    """Return the samples of ``root/split*.tar`` and ``root/split/*.tar``; the headers of all members are read.

    Raises:
        DataError: a sample lacks image or class, or the class is no number.
        OSError: a tar is damaged.
    """
    tars = _tars(root, split)
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, tar in enumerate(tars):
        samples: dict[str, dict[str, tuple[int, int] | int]] = {}
        for member in tar_members(tar):
            key, extension = split_name(member.name)
            if member.problem or not extension:
                continue
            sample = samples.setdefault(key, {})
            if extension in IMAGE_EXTENSIONS:
                sample["image"] = (member.offset, member.size)
            elif extension in ("cls", "cls.txt"):
                sample["label"] = _class_number(member.read(), f"{tar}: {member.name}")
        for key, sample in samples.items():
            place, label = sample.get("image"), sample.get("label")
            if not isinstance(place, tuple) or not isinstance(label, int):
                lacking = "image" if place is None else "class (.cls)"
                raise DataError(f"{tar}: sample {key!a} has no {lacking}; expected KEY.jpg and KEY.cls")
            places.append((number, *place))
            labels.append(label)
    if not places:
        raise DataError(f"the {len(tars)} tars {split}*.tar of {root} hold no samples; expected KEY.jpg and KEY.cls")
    tar_of, offsets, sizes = (np.array(column, np.int64) for column in zip(*places, strict=True))
    images = TarImages(tuple(tars), tar_of, offsets, sizes)
    classes = tuple(str(number) for number in range(max(labels) + 1))
    return LabelledSet(images, np.array(labels, np.int64), classes, f"{root.name}/{split}")


def _tars(root: Path, split: str) -> list[Path]:
    return sorted([*root.glob(f"{split}*.tar"), *(root / split).glob("*.tar")])


def _class_number(text: bytes, where: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise DataError(f"{where} holds {text[:40]!a}; expected a class number from 0 in decimal")
    return number


def _class_order(name: str) -> tuple[int, str]:
    """Numbers by value, names by alphabet; 1 and 01 are two classes, in the same order in every process."""
    return (int(name) if name.isdecimal() else -1, name)


def _renumbered(split: LabelledSet, classes: Sequence[str]) -> LabelledSet:
    number = {name: index for index, name in enumerate(classes)}
    new = np.array([number[name] for name in split.classes], np.int64)
    return LabelledSet(split.images, new[split.labels], tuple(classes), split.source)
