"""Images with captions, in the forms that sets are published in, one entry per image.

::

    captions.json         COCO annotations, dataset_coco.json of A. Karpathy, or [{"image": .., "caption": [..]}]
    captions.tsv, .token  image and caption columns, or a header; Flickr30k's results_20130124.token
    00000.tar, a folder   pairs as img2dataset writes them: KEY.jpg with KEY.txt or KEY.json

Test sets are read strictly: a record that cannot be used is an error, because leaving it out would change the score.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcl_megatron.data.document import Document
from lcl_megatron.data.image_stores.image_folder import ImageFolder
from lcl_megatron.data.image_stores.image_store import ImageTars, open_image_store
from lcl_megatron.data.image_stores.tar_members import IMAGE_EXTENSIONS, MAX_TEXT_BYTES, split_name, tar_members
from lcl_megatron.data.readers.coco import read_coco
from lcl_megatron.data.readers.records import RecordError, decode, get_text, parse_object
from lcl_megatron.data.readers.tsv import read_tsv
from lcl_megatron.evaluation.transfer.image_sets import DataError, FolderImages, ImageSet, StoredImages, TarImages

MAX_IMAGE_BYTES = 64 << 20
"""Larger image files are refused."""


@dataclass(frozen=True)
class CaptionedSet:
    """Images with one caption or more each."""

    images: ImageSet
    """N images."""
    captions: Sequence[tuple[str, ...]]
    """Captions of each."""
    source: str
    """Files and split, for messages and results."""
    left_out: dict[str, int]
    """Records that were left out, by reason; empty for a test set."""

    def __len__(self) -> int:
        """Return N."""
        return len(self.captions)

    def contents(self) -> tuple[object, ...]:
        """Return names of images and captions: what makes it the set that it is."""
        names = [self.images.name(index) for index in range(len(self.images))]
        return self.source, names, list(self.captions)


@dataclass(frozen=True)
class JoinedImages:
    """Several sets of images, one behind the other."""

    parts: Sequence[ImageSet]
    """The sets."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", list(itertools.accumulate(map(len, self.parts))))

    def __len__(self) -> int:
        """Return the number of images."""
        return sum(map(len, self.parts))

    def _find(self, index: int) -> tuple[ImageSet, int]:
        ends: list[int] = self._ends  # type: ignore[attr-defined]
        part = bisect.bisect_right(ends, index)
        return self.parts[part], index - (ends[part - 1] if part else 0)

    def name(self, index: int) -> str:
        """Return what its set calls an image."""
        part, inner = self._find(index)
        return part.name(inner)

    def read(self, index: int) -> bytes:
        """Return the encoded image; raises ``DataError``."""
        part, inner = self._find(index)
        return part.read(inner)

    @property
    def fingerprint(self) -> str:
        """Those of the parts."""
        return "-".join(part.fingerprint for part in self.parts)


def open_captioned(
    files: Sequence[Path], image_root: Path | None, split: str = "", *, is_test: bool = False
) -> CaptionedSet:
    """Return the images of some files, with all their captions.

    Args:
        files: caption files, tars, or folders of tars; see the module's text.
        image_root: what image names are relative to: a folder, or tars; not needed for tars of pairs.
        split: images of this split only, if the entries of a file name splits (dataset_coco.json); empty = all.
        is_test: a record that cannot be used is an error; in training sets such records are left out and counted.

    Raises:
        DataError: a file is missing, has no captions, or, in a test set, a record that cannot be used.
        ConfigError: the form of a file is not known.
        OSError: a file is damaged.
    """
    if not files:
        raise DataError("no caption files are given; name at least one")
    left_out: Counter[str] = Counter()
    parts = [_open(file, image_root, split, None if is_test else left_out) for file in files]
    source = ", ".join(file.name for file in files) + (f" ({split})" if split else "")
    captions = parts[0][1] if len(parts) == 1 else [texts for _, all_texts in parts for texts in all_texts]
    images = parts[0][0] if len(parts) == 1 else JoinedImages([images for images, _ in parts])
    return CaptionedSet(images, captions, source, dict(left_out))


def _open(
    file: Path, image_root: Path | None, split: str, left_out: Counter[str] | None
) -> tuple[ImageSet, list[tuple[str, ...]]]:
    _require_file(file)
    if file.is_dir() or file.suffix == ".tar":
        tars = sorted(file.glob("*.tar")) if file.is_dir() else [file]
        return _open_tars(file, tars, left_out)
    if image_root is None:
        raise DataError(f"{file} names images; give the folder or tars that hold them (--images)")
    captions = read_captions(file, split, left_out)
    store, names = open_image_store(image_root, MAX_IMAGE_BYTES), tuple(captions)
    if isinstance(store, ImageFolder):
        images: ImageSet = FolderImages(image_root, names)
    else:
        assert isinstance(store, ImageTars)
        images = StoredImages(store, names)
    return images, list(captions.values())


def read_captions(file: Path, split: str = "", left_out: Counter[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Return the captions of each image of a file, in order of appearance.

    Args:
        file: ``.json``, or a table.
        split: images of this split only, if the entries name splits; empty = all.
        left_out: where records that cannot be used are counted, by reason; None = such a record is an error.

    Raises:
        DataError: the file is missing or has no captions, or a record cannot be used.
        ConfigError: the form of the file is not known.
        OSError: the file is damaged.
    """
    _require_file(file)
    if file.suffix == ".json":
        records = read_coco(file, splits=(split,) if split and _has_splits(file) else ())
    else:
        records = read_tsv(file)
    captions: dict[str, list[str]] = {}
    for record in records:
        if isinstance(record, Document):
            captions.setdefault(record.images[0].name, []).append(record.segments[0].text)
        elif record.reason != "other split":
            if left_out is None:
                raise DataError(f"{record}; a test set is scored whole: repair the file")
            left_out[record.reason] += 1
    if not captions:
        raise DataError(
            f"{file} has no captions{f' of split {split!r}' if split else ''}; check the file and the split"
        )
    return {name: tuple(texts) for name, texts in captions.items()}


def _require_file(file: Path) -> None:
    if not file.exists():
        raise DataError(
            f"there is no caption file {file}; give a .json, .tsv or .token file, a .tar or a folder of tars"
        )


def _has_splits(file: Path) -> bool:
    """Whether the entries of a JSON file name splits; what is damaged is the reader's to report."""
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        return False
    entries = value.get("images") if isinstance(value, dict) else value
    return isinstance(entries, list) and any(isinstance(entry, dict) and "split" in entry for entry in entries)


def _open_tars(source: Path, tars: list[Path], left_out: Counter[str] | None) -> tuple[ImageSet, list[tuple[str, ...]]]:
    """Return the pairs of tars by the places of their images; texts are read, images are not."""
    places: list[tuple[int, int, int]] = []
    captions: list[tuple[str, ...]] = []
    for number, tar in enumerate(tars):
        for key, place, caption in _pairs(tar):
            if isinstance(caption, str) and place is not None:
                places.append((number, *place))
                captions.append((caption,))
                continue
            reason = caption.reason if isinstance(caption, RecordError) else "no images"
            if left_out is None:
                raise DataError(f"{tar}: sample {key!a}: {reason}; a test set is scored whole: repair the tar")
            left_out[reason] += 1
    if not captions:
        raise DataError(f"{source} holds no pairs in {len(tars)} tars; expected KEY.jpg with KEY.txt or KEY.json")
    tar_of, offsets, sizes = (np.array(column, np.int64) for column in zip(*places, strict=True))
    return TarImages(tuple(tars), tar_of, offsets, sizes), captions


def _pairs(tar: Path) -> Iterator[tuple[str, tuple[int, int] | None, str | RecordError]]:
    """Yield key, place of the image and caption of each sample, whose members stand one behind the other."""
    key, place = "", None
    texts: dict[str, bytes] = {}
    for member in tar_members(tar):
        member_key, extension = split_name(member.name)
        if not extension or member.problem:
            continue
        if member_key != key:
            if key:
                yield key, place, _caption(texts)
            key, place, texts = member_key, None, {}
        if extension in IMAGE_EXTENSIONS:
            place = (member.offset, member.size)
        elif extension in ("txt", "json") and member.size <= MAX_TEXT_BYTES:
            texts[extension] = member.read()
    if key:
        yield key, place, _caption(texts)


def _caption(texts: dict[str, bytes]) -> str | RecordError:
    try:
        if "txt" in texts:
            caption = decode(texts["txt"], "the caption")
        else:
            caption = get_text(parse_object(texts["json"]), "caption") if "json" in texts else ""
    except RecordError as error:
        return error
    return caption.strip() or RecordError("no caption")
