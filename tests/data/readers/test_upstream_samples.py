"""Genuine upstream samples, which are not part of the repository, to documents and to corpora.

Oracle: every source is read a second time here with json, zipfile, tarfile, csv or pyarrow alone, and compared with
the reader's documents and with the corpus, document by document: texts, image names, places, similarities, bytes.
"""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.data.document import Document, Reject
from lcl_megatron.data.preprocessing.preprocess import PreprocessConfig, preprocess
from lcl_megatron.data.readers.formats import FORMATS
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.tokenizer import Tokenizer

MATCHED, INLINE = 0, 1
FindImage = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Plain:
    """A document as the source says it; images are (name, number, segment, similarity, kind)."""

    source: str
    texts: list[str]
    images: list[tuple[str, int, int, float, int]]


def pair(source: str, name: str, caption: str, similarity: float = 1.0) -> Plain:
    return Plain(source, [caption.strip()], [(name, 0, 0, similarity, MATCHED)])


def plain(item: Document | Reject) -> Plain | Reject:
    if isinstance(item, Reject):
        return item
    images = [(i.name, i.number, i.segment_index, i.similarity, int(i.kind)) for i in item.images]
    return Plain(str(item.source), [segment.text for segment in item.segments], images)


def check_reader(format: str, path: Path, expected: Sequence[Plain]) -> None:
    assert [plain(item) for item in FORMATS[format].read(path, path.name)] == list(expected)
    assert len(expected) > 0


def check_corpus(corpus: Corpus, tokenizer: Tokenizer, expected: Iterable[Plain], find: FindImage) -> tuple[int, int]:
    """Compare a corpus with the documents and images that exist; returns the numbers of both that do not."""
    document = segment = image = lost_documents = lost_images = 0
    for source in expected:
        kept = [(entry, data) for entry in source.images if (data := find(entry[0])) is not None]
        lost_images += len(source.images) - len(kept)
        if not kept:
            lost_documents += 1
            continue
        assert corpus.document_source(document) == source.source
        assert corpus.document_segments[document : document + 2].tolist() == [segment, segment + len(source.texts)]
        assert corpus.document_images[document : document + 2].tolist() == [image, image + len(kept)]
        for text in source.texts:
            assert tokenizer.decode(corpus.segment_tokens(segment)) == text
            segment += 1
        for (name, number, place, similarity, kind), data in kept:
            assert corpus.image_source(image) == f"{source.source} image {number} ({name})"
            assert corpus.image_bytes(image) == data
            assert (corpus.image_segment[image], corpus.image_kind[image]) == (place, kind)
            assert corpus.image_similarity[image] == np.float32(similarity)
            image += 1
        document += 1
    assert (document, segment, image) == (corpus.num_documents, corpus.num_segments, corpus.num_images)
    return lost_documents, lost_images


def write(format: str, shards: Sequence[Path], image_root: Path | None, tokenizer_path: Path, output: Path) -> Corpus:
    config = PreprocessConfig(
        input=tuple(shards),
        format=format,
        image_root=image_root,
        tokenizer_model=tokenizer_path,
        output=output,
        max_rejected_image_share=1.0,
    )
    return preprocess(config).corpus


def in_folder(folder: Path) -> FindImage:
    return lambda name: (folder / name).read_bytes() if (folder / name).is_file() else None


# MMC4


def mmc4_documents(path: Path) -> list[Plain]:
    if path.suffix == ".zip":
        name, data = path.name[:-4], zipfile.ZipFile(path).read(path.name[:-4])
    else:
        name, data = path.name, path.read_bytes()
    documents = []
    for line, raw in enumerate(data.decode().split("\n"), start=1):
        if raw:
            record = json.loads(raw)
            images = [
                (info["image_name"], number, info["matched_text_index"], info["matched_sim"], MATCHED)
                for number, info in enumerate(record["image_info"])
            ]
            images.sort(key=lambda image: (image[2], image[1]))
            documents.append(Plain(f"{name}:{line}", [text.strip() for text in record["text_list"]], images))
    return documents


@pytest.mark.parametrize(
    "name", ["mmc4_readme_record.jsonl", "docs_shard_0_v2.jsonl.zip", "docs_no_face_shard_0_v3.jsonl"]
)
def test_the_published_mmc4_record(shared_data: Path, name: str):
    path = shared_data / "upstream_samples" / "mmc4" / name
    expected = mmc4_documents(path)
    check_reader("mmc4", path, expected)
    # Two images; the record lists the one of the third sentence first.
    assert [(image[0], image[1], image[2]) for image in expected[0].images] == [
        ("db1c21bc8474.jpg", 1, 1),
        ("b9040a0dbb22.jpg", 0, 2),
    ]


@pytest.mark.parametrize(
    ("folder", "documents"),
    [("mini/real", 40), ("mini/cifar10", 48), pytest.param("interleaved_real", 4112, marks=pytest.mark.slow)],
)
def test_mmc4_shards(shared_data: Path, tokenizer_path, tokenizer, tmp_path, folder: str, documents: int):
    root = shared_data / folder
    shards = sorted((root / "data").glob("*.zip"))
    expected = []
    for shard in shards:
        check_reader("mmc4", shard, mmc4_documents(shard))
        expected += mmc4_documents(shard)
    assert len(expected) == documents
    corpus = write("mmc4", shards, root / "images", tokenizer_path, tmp_path / "corpus")
    assert check_corpus(corpus, tokenizer, expected, in_folder(root / "images")) == (0, 0)


@pytest.mark.parametrize("layout", ["nested", "tars"])
def test_mmc4_images_split_into_folders_and_packed_into_tars(
    shared_data: Path, tokenizer_path, tokenizer, tmp_path, layout: str
):
    root = shared_data / "mini" / "real"
    packed = tmp_path / layout
    packed.mkdir()
    files = sorted((root / "images").iterdir())
    for number, file in enumerate(files):
        if layout == "nested":
            (packed / file.name[:2]).mkdir(exist_ok=True)
            (packed / file.name[:2] / file.name).write_bytes(file.read_bytes())
        else:
            with tarfile.open(packed / f"{number % 3}.tar", "a") as archive:
                archive.add(file, file.name)
    shards = sorted((root / "data").glob("*.zip"))
    corpus = write("mmc4", shards, packed, tokenizer_path, tmp_path / "corpus")
    expected = [document for shard in shards for document in mmc4_documents(shard)]
    assert check_corpus(corpus, tokenizer, expected, in_folder(root / "images")) == (0, 0)


# OBELICS


def obelics_documents(path: Path) -> list[Plain]:
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = []
    for line, row in enumerate(parquet.read_table(path).to_pylist(), start=1):
        metadata = json.loads(row["metadata"])
        texts: list[str] = []
        images: list[tuple[str, int, int, float, int]] = []
        for position, text in enumerate(row["texts"]):
            if text is None:
                images.append((metadata[position]["local_name"], len(images), len(texts), 1.0, INLINE))
            else:
                texts.append(text.strip())
        documents.append(Plain(f"{path.name}:{line}", texts, images))
    return documents


def test_obelics(shared_data: Path, tokenizer_path, tokenizer, tmp_path):
    root = shared_data / "interleaved_real"
    shards = sorted((root / "obelics").glob("*.parquet"))
    expected = []
    for shard in shards:
        expected += obelics_documents(shard)
        check_reader("obelics", shard, obelics_documents(shard))
    corpus = write("obelics", shards, root / "images", tokenizer_path, tmp_path / "corpus")
    assert check_corpus(corpus, tokenizer, expected, in_folder(root / "images")) == (0, 0)
    assert (corpus.num_documents, corpus.num_images) == (600, 1270)


# img2dataset


def tar_samples(path: Path) -> list[tuple[Plain, bytes, dict[str, object]]]:
    """Samples of a tar in the order in which their first member comes."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as archive:
        for info in archive:
            key, extension = info.name.split(".")
            samples.setdefault(key, {})[extension] = archive.extractfile(info).read()
    found = []
    for number, (key, parts) in enumerate(samples.items(), start=1):
        record = json.loads(parts["json"])
        document = pair(f"{path.name}:{number}", f"{key}.jpg", parts["txt"].decode(), record.get("similarity", 1.0))
        found.append((document, parts["jpg"], record))
    return found


@pytest.mark.parametrize(
    ("folder", "count"),
    [("upstream_samples/laion_img2dataset/output_webdataset", 52), ("mini/cifar10/pairs_wds", 175)],
)
def test_webdataset_tars(shared_data: Path, tokenizer_path, tokenizer, tmp_path, folder: str, count: int):
    shards = sorted((shared_data / folder).glob("*.tar"))
    samples = [sample for shard in shards for sample in tar_samples(shard)]
    for shard in shards:
        check_reader("webdataset", shard, [sample[0] for sample in tar_samples(shard)])
    data = {document.images[0][0]: image for document, image, _ in samples}
    corpus = write("webdataset", shards, None, tokenizer_path, tmp_path / "corpus")
    assert check_corpus(corpus, tokenizer, [sample[0] for sample in samples], data.get) == (0, 0)
    assert corpus.num_documents == len(samples) == count


def test_what_img2dataset_says_of_its_own_tars(shared_data: Path):
    """A second oracle: the parquet beside each tar, which also lists the rows that failed."""
    parquet = pytest.importorskip("pyarrow.parquet")
    for shard in sorted((shared_data / "upstream_samples/laion_img2dataset/output_webdataset").glob("*.tar")):
        rows = parquet.read_table(shard.with_suffix(".parquet")).to_pylist()
        expected = {
            f"{row['key']}.jpg": (row["caption"].strip(), row["similarity"])
            for row in rows
            if row["status"] == "success"
        }
        items = list(FORMATS["webdataset"].read(shard, shard.name))
        assert {item.images[0].name: (item.segments[0].text, item.images[0].similarity) for item in items} == expected


def test_urls_are_found_in_the_tars_that_img2dataset_made_of_them(
    shared_data: Path, tokenizer_path, tokenizer, tmp_path
):
    """Captions and URLs from the metadata that img2dataset was given, images from its tars; two of the 54 failed."""
    parquet = pytest.importorskip("pyarrow.parquet")
    root = shared_data / "upstream_samples" / "laion_img2dataset"
    rows = [row for path in sorted((root / "laion400m-meta").iterdir()) for row in parquet.read_table(path).to_pylist()]
    table = tmp_path / "pairs.tsv"
    table.write_text("".join(f"{row['TEXT']}\t{row['URL']}\n" for row in rows), encoding="utf-8")
    tars = tmp_path / "tars"
    tars.mkdir()
    data = {}
    for shard in sorted((root / "output_webdataset").glob("*.tar")):
        (tars / shard.name).symlink_to(shard)
        data |= {str(record["url"]): image for _, image, record in tar_samples(shard)}
    expected = [pair(f"pairs.tsv:{line}", row["URL"], row["TEXT"]) for line, row in enumerate(rows, start=1)]
    corpus = write("tsv", [table], tars, tokenizer_path, tmp_path / "corpus")
    assert check_corpus(corpus, tokenizer, expected, data.get) == (2, 2)
    assert corpus.num_documents == 52


# COCO


def coco_documents(path: Path) -> list[Plain]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, list):
        captions = [(entry["image"], caption) for entry in value for caption in entry["caption"]]
    else:
        files = {image["id"]: image["file_name"] for image in value["images"]}
        captions = [(files[entry["image_id"]], entry["caption"]) for entry in value["annotations"]]
    return [pair(f"{path.name}:{number}", *item) for number, item in enumerate(captions, start=1)]


@pytest.mark.parametrize(
    ("name", "images", "documents"),
    [
        ("upstream_samples/coco/annotations/captions_train2017_mini.json", "upstream_samples/coco/train2017", 400),
        ("upstream_samples/coco/annotations/captions_val2017_mini.json", "upstream_samples/coco/val2017", 395),
        ("upstream_samples/coco/annotations/captions_val2017_first200.json", None, 1001),
        ("upstream_samples/coco/coco_mini_karpathy_style.json", "upstream_samples/coco", 255),
        ("labelled/cifar10/captions/captions_dev_test_coco.json", None, 5000),
        ("labelled/cifar10/captions/captions_dev_test_karpathy.json", None, 5000),
    ],
)
def test_coco(shared_data: Path, tokenizer_path, tokenizer, tmp_path, name: str, images: str | None, documents: int):
    path = shared_data / name
    expected = coco_documents(path)
    assert len(expected) == documents
    check_reader("coco", path, expected)
    if images is not None:
        corpus = write("coco", [path], shared_data / images, tokenizer_path, tmp_path / "corpus")
        lost, lost_images = check_corpus(corpus, tokenizer, expected, in_folder(shared_data / images))
        assert lost == lost_images == len(expected) - corpus.num_documents
        assert corpus.num_documents > 0


# Tables


def table_documents(path: Path, image_column: int) -> list[Plain]:
    documents = []
    for line, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if text:
            columns = text.split("\t")
            assert len(columns) == 2
            name = re.sub(r"(?<=\.jpg)#[0-9]$", "", columns[image_column])
            documents.append(pair(f"{path.name}:{line}", name, columns[1 - image_column]))
    return documents


@pytest.mark.parametrize(
    ("name", "image_column", "lines"),
    [
        ("upstream_samples/cc3m/Validation_GCC-1.1.0-Validation_first500.tsv", 1, 500),
        ("upstream_samples/flickr8k/Flickr8k.token.txt", 0, 20),
        ("mini/cifar10/pairs.tsv", 0, 175),
        ("labelled/cifar10/docs_10k/mixed/pairs.tsv", 0, 9512),
        ("labelled/clothing/docs/redundant/pairs.tsv", 0, 2353),
    ],
)
def test_tables(shared_data: Path, name: str, image_column: int, lines: int):
    path = shared_data / name
    expected = table_documents(path, image_column)
    assert len(expected) == lines
    check_reader("tsv", path, expected)
    explicit = "tsv-caption-image" if image_column else "tsv-image-caption"
    if "flickr" not in name:
        check_reader(explicit, path, expected)


def test_a_table_with_its_images(shared_data: Path, tokenizer_path, tokenizer, tmp_path):
    root = shared_data / "mini" / "cifar10"
    corpus = write("tsv", [root / "pairs.tsv"], root / "images", tokenizer_path, tmp_path / "corpus")
    expected = table_documents(root / "pairs.tsv", 0)
    assert check_corpus(corpus, tokenizer, expected, in_folder(root / "images")) == (0, 0)
