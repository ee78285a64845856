"""Captioned sets. Oracles: what the test wrote, the same in every form, and counts of genuine COCO and Flickr files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.evaluation.transfer.caption_sets import CaptionedSet, open_captioned
from lcl_megatron.evaluation.transfer.image_sets import DataError
from tests.evaluation.transfer.small_sets import picture, write_captioned, write_tar

CAPTIONS = [("a red square", "this one is red"), ("a blue square", "this one is blue")]
DATA = [picture("red", 0), picture("blue", 1)]


def contents(found: CaptionedSet) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(found.images.read(index), texts) for index, texts in enumerate(found.captions)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, data in zip(("0.png", "1.png"), DATA, strict=True):
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def karpathy_list(root: Path) -> Path:
    entries = [{"image": f"{n}.png", "caption": list(texts)} for n, texts in enumerate(CAPTIONS)]
    return write(root / "list.json", json.dumps(entries))


def coco(root: Path) -> Path:
    images = [{"id": n, "file_name": f"{n}.png"} for n in range(2)]
    notes = [{"image_id": n, "caption": text} for k in range(2) for n in range(2) for text in [CAPTIONS[n][k]]]
    return write(root / "coco.json", json.dumps({"images": images, "annotations": notes}))


def token_file(root: Path) -> Path:
    lines = [f"{n}.png#{k}\t{text}\n" for n, texts in enumerate(CAPTIONS) for k, text in enumerate(texts)]
    return write(root / "results_20130124.token", "".join(lines))


@pytest.mark.parametrize("make", [karpathy_list, coco, token_file])
def test_every_form_gives_images_with_all_captions(root: Path, make: object) -> None:
    found = open_captioned([make(root)], root / "images", "test", is_test=True)  # type: ignore[operator]
    assert contents(found) == list(zip(DATA, CAPTIONS, strict=True))


def test_splits_of_dataset_coco(tmp_path: Path) -> None:
    file = write_captioned(tmp_path, 5, split_at=3)
    test = open_captioned([file], tmp_path / "images", "test", is_test=True)
    assert [texts[0] for texts in test.captions] == ["a blue square", "a green square"]
    assert test.images.read(1) == picture("green", 4)
    assert len(open_captioned([file], tmp_path / "images")) == 5
    with pytest.raises(DataError, match=r"dataset_coco\.json has no captions of split 'zork'"):
        open_captioned([file], tmp_path / "images", "zork")


def tar_members(count: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(count):
        members += [(f"{number}.png", DATA[number]), (f"{number}.txt", CAPTIONS[number][0].encode())]
    return members


def test_tars_of_pairs_alone_and_beside_a_file(root: Path) -> None:
    write_tar(root / "tars" / "0.tar", tar_members(2))
    record = json.dumps({"caption": " one more "}).encode()
    write_tar(root / "tars" / "1.tar", [("9.json", record), ("9.png", DATA[1])])
    expected = [(DATA[0], ("a red square",)), (DATA[1], ("a blue square",)), (DATA[1], ("one more",))]
    assert contents(open_captioned([root / "tars"], None)) == expected
    assert contents(open_captioned([root / "tars" / "0.tar"], None)) == expected[:2]

    both = open_captioned([root / "tars", token_file(root)], root / "images")
    assert contents(both) == [*expected, *zip(DATA, CAPTIONS, strict=True)]
    assert both.images.name(0) == f"{root / 'tars' / '0.tar'} at byte 512"
    assert both.images.fingerprint
    assert both.source == "tars, results_20130124.token"


def test_images_may_lie_in_tars(root: Path) -> None:
    write_tar(root / "stored" / "0.tar", [("0.png", DATA[0]), ("1.png", DATA[1])])
    found = open_captioned([karpathy_list(root)], root / "stored")
    assert contents(found) == list(zip(DATA, CAPTIONS, strict=True))


def test_bad_records_are_counted_in_training_and_errors_in_tests(root: Path) -> None:
    broken = write_tar(root / "b.tar", [*tar_members(2), ("2.png", DATA[0]), ("3.txt", b"alone"), ("4.txt", b"\xff")])
    found = open_captioned([broken], None)
    assert len(found) == 2
    assert found.left_out == {"no caption": 1, "no images": 1, "not UTF-8": 1}
    with pytest.raises(DataError, match=r"b\.tar: sample '2': no caption; a test set is scored whole"):
        open_captioned([broken], None, is_test=True)

    entries = [{"image": "0.png", "caption": ["a"]}, {"image": "1.png", "caption": []}]
    file = write(root / "list.json", json.dumps(entries))
    assert open_captioned([file], root / "images").left_out == {"no caption": 1}
    with pytest.raises(DataError, match=r"list\.json:2: no caption.*; a test set is scored whole: repair the file"):
        open_captioned([file], root / "images", is_test=True)


def test_missing_and_unknown_files_are_explained(root: Path) -> None:
    with pytest.raises(DataError, match="no caption files are given"):
        open_captioned([], None)
    with pytest.raises(DataError, match=r"there is no caption file .*nowhere\.json"):
        open_captioned([root / "nowhere.json"], root)
    with pytest.raises(
        DataError, match=r"list\.json names images; give the folder or tars that hold them \(--images\)"
    ):
        open_captioned([karpathy_list(root)], None)
    with pytest.raises(DataError, match="images holds no pairs in 0 tars"):
        open_captioned([root / "images"], None)
    with pytest.raises(ConfigError, match="expected COCO's images and annotations"):
        open_captioned([write(root / "a.json", '{"a": 1}')], root / "images")
    with pytest.raises(OSError, match=r"a\.json is not a JSON file"):
        open_captioned([write(root / "a.json", "{")], root / "images", "test")
    damaged = write_tar(root / "d.tar", tar_members(2))
    damaged.write_bytes(damaged.read_bytes()[:1500])
    with pytest.raises(OSError, match=r"d\.tar is a damaged tar file"):
        open_captioned([damaged], None)


def test_genuine_files(shared_data: Path) -> None:
    folder = shared_data / "upstream_samples"
    coco_mini = open_captioned([folder / "coco" / "coco_mini_karpathy_style.json"], folder / "coco", is_test=True)
    assert len(coco_mini) == 51
    assert all(len(texts) >= 5 for texts in coco_mini.captions)
    assert coco_mini.images.read(0)[:2] == b"\xff\xd8"
    flickr = open_captioned([folder / "flickr8k" / "Flickr8k.token.txt"], folder, is_test=True)
    assert [len(texts) for texts in flickr.captions] == [5, 5, 5, 5]
    pairs = open_captioned([folder / "laion_img2dataset" / "output_webdataset"], None)
    assert len(pairs) == 52
    assert pairs.left_out == {}
