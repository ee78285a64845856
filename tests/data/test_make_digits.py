"""The digits example: files, splits, text.

Oracles: scikit-learn's own labels, byte equality of two runs, and the corpus made from the files by the real tools.
"""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from lcl_megatron.data.preprocessing.tokenizer_texts import training_texts
from lcl_megatron.data.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def make(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "digits" / "make_corpus.py"), "--output", str(output), *more]
    return subprocess.run(command, cwd=output.parent, capture_output=True, text=True, check=False)


SMALL = ("--drawings-per-scan", "1", "--documents-per-image", "2", "--documents-per-shard", "300")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("digits") / "digits"
    done = make(output, *SMALL)
    assert done.returncode == 0, done.stderr
    return output


def read_labels(digits: Path) -> list[dict[str, str]]:
    with open(digits / "labels.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_documents(digits: Path) -> list[dict[str, object]]:
    shards = sorted((digits / "data").iterdir(), key=lambda path: int(path.name.split("_")[2]))
    return [
        json.loads(line)
        for shard in shards
        for line in zipfile.ZipFile(shard).read(shard.name.removesuffix(".zip")).splitlines()
    ]


def named_digits(text: str) -> set[int]:
    words = text.lower().replace(".", "").replace(",", "").split()
    return {index for index, word in enumerate(WORDS) if word in words or str(index) in words}


def tree_hash(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_arguments_give_the_same_files_and_another_seed_others(digits: Path, tmp_path: Path):
    assert make(tmp_path / "again", *SMALL).returncode == 0
    assert tree_hash(tmp_path / "again") == tree_hash(digits)
    assert make(tmp_path / "other", *SMALL, "--seed", "1").returncode == 0
    other = tree_hash(tmp_path / "other")
    assert other["labels.csv"] != tree_hash(digits)["labels.csv"]


def test_a_folder_with_files_is_not_touched(digits: Path):
    before = tree_hash(digits)
    done = make(digits, *SMALL)
    assert done.returncode == 1
    assert "is not empty" in done.stderr
    assert tree_hash(digits) == before


def test_splits_share_no_scan_and_labels_are_right(digits: Path):
    rows = read_labels(digits)
    scans = {
        split: {row["image_name"].split("_")[0] for row in rows if row["split"] == split}
        for split in ("pretrain", "probe_train", "test")
    }
    assert {split: len(names) for split, names in scans.items()} == {"pretrain": 1100, "probe_train": 300, "test": 397}
    assert len(set.union(*scans.values())) == 1797
    target = load_digits().target
    assert all(int(row["label"]) == target[int(row["image_name"].split("_")[0])] for row in rows)
    for row in rows[::100]:
        with Image.open(digits / "images" / row["image_name"]) as image:
            assert (image.size, image.mode, image.format) == ((48, 48), "RGB", "PNG")


def test_documents_hold_pretrain_images_only_each_as_often_as_asked(digits: Path):
    split = {row["image_name"]: row["split"] for row in read_labels(digits)}
    documents = read_documents(digits)
    uses = Counter(info["image_name"] for document in documents for info in document["image_info"])
    digit_uses = {name: count for name, count in uses.items() if not name.startswith("junk")}
    assert set(digit_uses) == {name for name, part in split.items() if part == "pretrain"}
    assert set(digit_uses.values()) == {2}
    counts = Counter(len(document["image_info"]) for document in documents)
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    junk = sum(count for name, count in uses.items() if name.startswith("junk"))
    assert junk / sum(uses.values()) == pytest.approx(0.05, abs=0.005)


def test_text_before_an_image_names_its_digit_most_of_the_time(digits: Path):
    """A training row shows an image before or after the sentence it is matched to; both must have been announced."""
    label = {row["image_name"]: int(row["label"]) for row in read_labels(digits)}
    announced = wrong = total = 0
    for document in read_documents(digits):
        for info in document["image_info"]:
            index, texts = info["matched_text_index"], document["text_list"]
            assert 0 < index < len(texts) - 1
            if info["image_name"] not in label:
                assert info["matched_sim"] < 0.24
                continue
            assert info["matched_sim"] >= 0.24
            before = named_digits(texts[index - 1])
            total += 1
            announced += before == {label[info["image_name"]]}
            wrong += bool(before - {label[info["image_name"]]})
    assert wrong == 0
    assert announced / total == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [(("--announced", "1"), 1.0, 0.9), (("--announced", "0", "--captioned", "0", "--followed-up", "1"), 0.0, 1.0)],
    ids=["redundant", "descriptive"],
)
def test_what_the_text_gives_away_can_be_chosen(
    digits: Path, tmp_path: Path, flags: tuple[str, ...], before: float, after: float
):
    done = make(tmp_path / "digits", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    label = {row["image_name"]: int(row["label"]) for row in read_labels(digits)}
    named_before, named_after = [], []
    for document in read_documents(tmp_path / "digits"):
        for info in document["image_info"]:
            index, texts = info["matched_text_index"], document["text_list"]
            if info["image_name"] in label:
                digit = {label[info["image_name"]]}
                named_before.append(named_digits(" ".join(texts[index - 1 : index + ("0" in flags)])) == digit)
                named_after.append(named_digits(texts[index + 1]) == digit)
    assert sum(named_before) / len(named_before) == before
    assert sum(named_after) / len(named_after) == pytest.approx(after, abs=0.03)
    # The same images as in the default documents.
    images = tree_hash(tmp_path / "digits" / "images")
    assert {name for name in images if not name.startswith("junk")} <= tree_hash(digits / "images").keys()


def test_a_share_outside_0_to_1_is_refused(tmp_path: Path):
    done = make(tmp_path / "digits", "--announced", "1.5")
    assert done.returncode != 0
    assert "announced = 1.5 is outside [0, 1]" in " ".join(done.stderr.split())


def test_the_tools_make_a_corpus_of_it(digits: Path, tmp_path: Path):
    shards = tuple(sorted((digits / "data").iterdir()))
    train_tokenizer(training_texts(shards, 20_000), tmp_path / "tokenizer.model", 512)
    summary = preprocess(
        PreprocessConfig(
            input=shards,
            image_root=digits / "images",
            output=tmp_path / "corpus",
            tokenizer_model=tmp_path / "tokenizer.model",
        )
    )
    documents = read_documents(digits)
    assert summary.corpus.num_documents == len(documents)
    assert summary.corpus.num_images == sum(len(document["image_info"]) for document in documents)
    assert summary.totals.rejected_images.total() == summary.totals.rejected_documents.total() == 0
