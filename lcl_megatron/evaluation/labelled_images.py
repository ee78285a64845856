"""Images with a class: a folder of image files and a ``labels.csv`` beside it.

``labels.csv`` has a header with at least the columns ``image_name``, ``split`` and ``label``; other columns are
ignored. Names are relative to the image folder. Classes are numbered in alphabetical order over *all* splits, so that
the same number means the same class in training and test images.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from lcl_megatron.data.decoding.images import evaluation_image
from lcl_megatron.data.image_stores.image_folder import ImageFileError, check_name
from lcl_megatron.evaluation.transfer.image_sets import DataError, FolderImages, PixelReader

COLUMNS = ("image_name", "split", "label")
"""Columns that ``labels.csv`` must have."""


class LabelError(DataError):
    """A ``labels.csv`` that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class LabelledImages:
    """The images of one split, in the order of the file."""

    names: tuple[str, ...]
    """Names of the N files, relative to the image folder."""
    labels: np.ndarray
    """(N,) int64, index into ``classes``."""
    classes: tuple[str, ...]
    """Names of the classes of all splits, in alphabetical order."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.names)


def read_labels(labels_csv: Path, split: str, limit: int = 0) -> LabelledImages:
    """Read names and classes of the images of one split.

    Args:
        labels_csv: file with the columns ``image_name``, ``split``, ``label``.
        split: value of the column ``split``.
        limit: use the first so many images of the split; 0 = all.

    Raises:
        FileNotFoundError: there is no such file.
        LabelError: a column is missing; a line has an empty field, a name that leaves the folder or that came before
            (an image in two splits would be recognised, not classified); or the split is empty.
    """
    try:
        rows = _read_rows(labels_csv)
    except (csv.Error, UnicodeDecodeError) as error:
        raise LabelError(f"{labels_csv}: not a CSV file in UTF-8: {error}") from error
    chosen = [(name, label) for name, row_split, label in rows if row_split == split]
    if not chosen:
        raise LabelError(f"{labels_csv}: no image in split {split!r}; splits: {sorted({row[1] for row in rows})}")
    if limit > 0:
        chosen = chosen[:limit]
    classes = tuple(sorted({label for _, _, label in rows}))
    number = {label: index for index, label in enumerate(classes)}
    return LabelledImages(
        names=tuple(name for name, _ in chosen),
        labels=np.array([number[label] for _, label in chosen], dtype=np.int64),
        classes=classes,
    )


def _read_rows(labels_csv: Path) -> list[tuple[str, str, str]]:
    """Return name, split and class of every line; see ``read_labels`` for what is refused."""
    first_line: dict[str, int] = {}
    rows: list[tuple[str, str, str]] = []
    with labels_csv.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader.fieldnames or [])
        missing = [column for column in COLUMNS if column not in found]
        if missing:
            raise LabelError(
                f"{labels_csv}:1: no column {', '.join(missing)}; found {', '.join(found) or 'nothing'}, "
                f"expected {', '.join(COLUMNS)}"
            )
        for record in reader:
            name, split, label = (record[column] for column in COLUMNS)
            _check_row(f"{labels_csv}:{reader.line_num}", name, split, label, first_line)
            first_line[name] = reader.line_num
            rows.append((name, split, label))
    return rows


def _check_row(source: str, name: str | None, split: str | None, label: str | None, first_line: dict[str, int]) -> None:
    """Raise LabelError if a line of ``labels.csv`` is incomplete or its image unusable."""
    for column, value in zip(COLUMNS, (name, split, label), strict=True):
        if not value or not value.strip():
            raise LabelError(f"{source}: {column} is empty; every line needs {', '.join(COLUMNS)}")
    if name in first_line:
        raise LabelError(f"{source}: {name} was already on line {first_line[name]}; an image has one line")
    try:
        check_name(str(name))
    except ImageFileError as error:
        raise LabelError(f"{source}: {error}") from error


class DecodedImages:
    """The pixels of labelled images, decoded when a slice of them is asked for; an ``ImageSource`` of ``features``.

    The transform is OpenCLIP's for evaluation: shorter side to the image size, bicubic, then the centre. A bad image
    ends the evaluation: leaving it out would change what the accuracy is a share of.
    """

    def __init__(self, images: LabelledImages, image_folder: Path, image_size: int, num_threads: int = 0) -> None:
        """Check that every file is there, so that an hour of encoding does not end in a missing one.

        Args:
            images: which images.
            image_folder: folder that their names are relative to.
            image_size: side of the result, in pixels.
            num_threads: images decoded at the same time; 0 = one per CPU core.

        Raises:
            DataError: the folder or some files are missing; the message counts them and names the first.
        """
        files = FolderImages(image_folder, images.names)
        _ = files.fingerprint  # looks for every file
        self._numbers = np.arange(len(images))
        self._reader = PixelReader(files, lambda data, _key: evaluation_image(data, image_size), num_threads)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._numbers)

    def __getitem__(self, index: slice, /) -> Tensor:
        """Return pixels (n, 3, size, size) uint8 RGB of the images of a slice.

        Raises:
            DataError: an image cannot be read or decoded.
            OSError: the disk fails.
        """
        return self._reader(self._numbers[index])
