"""Sets of encoded images. Oracles: the bytes that the test wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lcl_megatron.data.image_stores.image_folder import url_file_name
from lcl_megatron.data.image_stores.image_store import open_image_store
from lcl_megatron.data.image_stores.tar_members import tar_members
from lcl_megatron.evaluation.encoders.preprocessing import Preprocessing
from lcl_megatron.evaluation.transfer.image_sets import (
    DataError,
    FolderImages,
    ImageSet,
    PixelReader,
    StoredImages,
    TarImages,
)
from tests.evaluation.transfer.small_sets import picture, write_tar

NAMES = ("a.png", "b.png", "c.png")
DATA = [picture("red", number) for number in range(3)]
PREPROCESSING = Preprocessing(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def folder_images(root: Path) -> FolderImages:
    root.mkdir(exist_ok=True)
    for name, data in zip(NAMES, DATA, strict=True):
        (root / name).write_bytes(data)
    return FolderImages(root, NAMES)


def tar_images(root: Path) -> TarImages:
    tars = (
        write_tar(root / "0.tar", list(zip(NAMES[:2], DATA, strict=False))),
        write_tar(root / "1.tar", [(NAMES[2], DATA[2])]),
    )
    places = [(n, m.offset, m.size) for n, tar in enumerate(tars) for m in tar_members(tar)]
    return TarImages(tars, *(np.array(column, np.int64) for column in zip(*places, strict=True)))


def stored_images(root: Path) -> ImageSet:
    tar_images(root)
    return StoredImages(open_image_store(root, 1 << 20), NAMES)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [folder_images, tar_images, stored_images])
def test_images_are_the_bytes_that_were_written(tmp_path: Path, make: object) -> None:
    images: ImageSet = make(tmp_path / "set")  # type: ignore[operator]
    assert len(images) == 3
    assert [images.read(index) for index in range(3)] == DATA
    assert len({images.name(index) for index in range(3)}) == 3

    before = images.fingerprint
    again: ImageSet = make(tmp_path / "set2")  # type: ignore[operator]
    assert again.fingerprint != before


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    images = folder_images(tmp_path)
    assert FolderImages(tmp_path, NAMES).fingerprint == images.fingerprint
    assert FolderImages(tmp_path, NAMES[::-1]).fingerprint != images.fingerprint
    (tmp_path / "a.png").write_bytes(DATA[0] + b"x")
    assert FolderImages(tmp_path, NAMES).fingerprint != images.fingerprint


def test_files_are_found_where_image_folders_have_them(tmp_path: Path) -> None:
    url = "https://example.org/a.jpg"
    for name, data in (("ab/abc.png", DATA[0]), (url_file_name(url), DATA[1])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    images = FolderImages(tmp_path, ("abc.png", url))
    assert [images.read(0), images.read(1)] == DATA[:2]
    assert images.fingerprint


def test_missing_images_are_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no image folder .*nowhere; unpack the images"):
        FolderImages(tmp_path / "nowhere", NAMES)
    images = folder_images(tmp_path)
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are not in .*, the first is b\.png"):
        assert images.fingerprint
    with pytest.raises(DataError, match=r"b\.png: missing file; complete the images"):
        images.read(1)

    stored = StoredImages(open_image_store(_tar_folder(tmp_path), 1 << 20), ("zork.png",))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"zork\.png: missing file.*; complete the tars"):
        stored.read(0)


def _tar_folder(tmp_path: Path) -> Path:
    tar_images(tmp_path / "tars")
    return tmp_path / "tars"


def test_a_tar_that_was_cut_is_explained(tmp_path: Path) -> None:
    images = tar_images(tmp_path)
    images.tars[1].write_bytes(images.tars[1].read_bytes()[:600])
    with pytest.raises(DataError, match=r"1\.tar at byte 512: the file ends inside the image"):
        images.read(2)


def test_reader_keeps_the_order_and_hands_keys_on(tmp_path: Path) -> None:
    images = folder_images(tmp_path)
    reader = PixelReader(images, lambda data, key: PREPROCESSING(data) // (key + 1), num_threads=2)
    found = reader(np.array([2, 0, 2]), np.array([0, 1, 1]))
    assert found.shape == (3, 3, 8, 8)
    for pixels, index, key in zip(found, (2, 0, 2), (0, 1, 1), strict=True):
        assert torch.equal(pixels, PREPROCESSING(DATA[index]) // (key + 1))
    assert torch.equal(reader(np.array([1]))[0], PREPROCESSING(DATA[1]))


def test_damaged_images_are_named_or_left_out(tmp_path: Path) -> None:
    images = folder_images(tmp_path)
    (tmp_path / "b.png").write_bytes(DATA[1][:100])
    reader = PixelReader(images, lambda data, _key: PREPROCESSING(data))
    with pytest.raises(DataError, match=r"b\.png: .*; repair the image or take it out of the set"):
        reader(np.arange(3))
    pixels, is_good = reader.read_good(np.arange(3))
    assert is_good.tolist() == [True, False, True]
    assert not pixels[1].any()
    assert torch.equal(pixels[2], PREPROCESSING(DATA[2]))
    with pytest.raises(DataError, match=r"b\.png"):
        reader.read_good(np.array([1]))
    pixels, is_good = reader.read_good(np.array([1]), size=8)
    assert (pixels.shape, int(pixels.sum()), is_good.tolist()) == ((1, 3, 8, 8), 0, [False])
