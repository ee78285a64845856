"""Preprocessing from shards to corpus.

Oracles: an independent reading of the shards with json and Pillow; byte equality between interrupted and undisturbed
runs; rejects listed by hand.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.document import Document, ImageKind, ImageSegment, Source, TextSegment
from lcl_megatron.data.image_stores.image_folder import ImageFileError, ImageFolder
from lcl_megatron.data.preprocessing.image_processing import probe_image
from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig, input_names
from lcl_megatron.data.preprocessing.progress import Counters, Progress
from lcl_megatron.data.preprocessing.shard_encoder import load_tokenizer
from lcl_megatron.data.readers.formats import FORMATS, Format
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.preprocess_runs import config, tree_hash, write_shards

ROOT = Path(__file__).parents[3]


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 64)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def shards(mmc4) -> list[Path]:
    return write_shards(mmc4)


class StopAfter(Progress):
    """Ends a run by an exception when so many shards are finished, and keeps the notes."""

    def __init__(self, shards: int) -> None:
        super().__init__()
        self.left = shards
        self.notes: list[str] = []

    def shard_finished(self, part: Path, counters: Counters) -> None:
        super().shard_finished(part, counters)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def note(self, line: str) -> None:
        self.notes.append(line)


def read_independently(shard: Path) -> list[tuple[int, dict[str, object]]]:
    data = zipfile.ZipFile(shard).read(shard.stem) if shard.suffix == ".zip" else shard.read_bytes()
    found = []
    for line, raw in enumerate(data.splitlines(), start=1):
        try:
            found.append((line, json.loads(raw)))
        except ValueError:
            continue
    return found


def check_against_shards(corpus: Corpus, tokenizer: Tokenizer, shards: list[Path], images: Path) -> int:
    """Compare every document of a corpus with the shards; returns the number of images that are missing."""
    document = image = segment = missing = 0
    for shard in shards:
        for line, raw in read_independently(shard):
            infos = sorted(enumerate(raw["image_info"]), key=lambda item: item[1]["matched_text_index"])
            present = [(number, info) for number, info in infos if (images / info["image_name"]).exists()]
            missing += len(infos) - len(present)
            if not present:
                continue
            assert corpus.document_source(document) == f"{shard.name.removesuffix('.zip')}:{line}"
            assert corpus.document_images[document] == image
            assert corpus.document_segments[document] == segment
            for text in raw["text_list"]:
                assert tokenizer.decode(corpus.segment_tokens(segment)) == text.strip()
                segment += 1
            for number, info in present:
                data = (images / info["image_name"]).read_bytes()
                assert corpus.image_bytes(image) == data
                assert corpus.image_source(image).endswith(f":{line} image {number} ({info['image_name']})")
                assert corpus.image_segment[image] == info["matched_text_index"]
                assert corpus.image_similarity[image] == pytest.approx(info["matched_sim"], abs=1e-6)
                assert (corpus.image_width[image], corpus.image_height[image]) == Image.open(io.BytesIO(data)).size
                image += 1
            document += 1
    assert (corpus.num_documents, corpus.num_segments, corpus.num_images) == (document, segment, image)
    return missing


def test_the_corpus_holds_what_the_shards_say(mmc4, shards, tokenizer_path, tokenizer, tmp_path):
    summary = preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus"))
    missing = check_against_shards(summary.corpus, tokenizer, shards, mmc4.images)
    assert missing > 0
    assert summary.totals.rejected_images == {"missing file": missing}
    records = sum(len(read_independently(shard)) for shard in shards)
    assert records > summary.corpus.num_documents
    assert summary.totals.rejected_documents == {
        "malformed JSON": 5,
        "no images": records - summary.corpus.num_documents,
    }
    assert f"images     {summary.corpus.num_images:,}" in str(summary)
    assert f"{missing:,} missing file" in str(summary)
    rejects = [json.loads(line) for line in (tmp_path / "corpus" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == missing + 5 + records - summary.corpus.num_documents
    assert {"file": "docs_shard_1_v2.jsonl", "line": 2, "reason": "malformed JSON"}.items() <= next(
        reject for reject in rejects if reject["file"] == "docs_shard_1_v2.jsonl"
    ).items()
    assert all(reject["image_name"].endswith(".png") for reject in rejects if reject["reason"] == "missing file")
    assert [entry["name"] for entry in summary.corpus.manifest["inputs"]] == [shard.name for shard in shards]
    assert [entry["bytes"] for entry in summary.corpus.manifest["inputs"]] == [shard.stat().st_size for shard in shards]


def test_an_interrupted_run_goes_on_where_it_stopped(mmc4, shards, tokenizer_path, tmp_path):
    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "whole"))
    job = config(mmc4, shards, tokenizer_path, tmp_path / "corpus")
    with pytest.raises(KeyboardInterrupt):
        preprocess(job, StopAfter(2))
    assert not (tmp_path / "corpus").exists()
    rest = StopAfter(100)
    preprocess(job, rest)
    assert rest.notes == ["taking up an interrupted run: 2 of 5 shards are done"]
    assert 100 - rest.left == 3
    assert tree_hash(tmp_path / "corpus") == tree_hash(tmp_path / "whole")


def test_a_changed_input_is_read_again(mmc4, shards, tokenizer_path, tmp_path, record):
    job = config(mmc4, shards, tokenizer_path, tmp_path / "corpus")
    with pytest.raises(KeyboardInterrupt):
        preprocess(job, StopAfter(1))
    mmc4.add_image("new.png")
    mmc4.add_shard(shards[0].name, [record(["Replaced."], [("new.png", 0, 0.5)])])
    summary = preprocess(job)
    assert summary.corpus.image_source(0) == f"{shards[0].name}:1 image 0 (new.png)"


def test_changed_rules_for_images_do_not_mix_with_what_is_finished(mmc4, shards, tokenizer_path, tmp_path):
    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "whole", resize_short_side=8))
    with pytest.raises(KeyboardInterrupt):
        preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus"), StopAfter(2))
    summary = preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus", resize_short_side=8))
    assert tree_hash(tmp_path / "corpus") == tree_hash(tmp_path / "whole")
    assert summary.totals.resized_images > 0
    assert summary.corpus.manifest["image_processing"] == {
        "check_images": "header",
        "resize_short_side": 8,
        "jpeg_quality": 90,
    }


def test_a_tokenizer_that_changes_meanwhile_is_found(mmc4, shards, tokenizer_path, tmp_path):
    model = tmp_path / "t.model"
    model.write_bytes(tokenizer_path.read_bytes())
    other = train_tokenizer(["another text about nothing"], tmp_path / "other.model", 290)
    with pytest.raises(ConfigError, match=f"other.model has changed while it was in use: .* {other.fingerprint[:16]}"):
        load_tokenizer(tmp_path / "other.model", Tokenizer.load(model).fingerprint)


def tool(mmc4, shards, tokenizer_path, output, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        "--input",
        *map(str, shards),
        "--image-root",
        str(mmc4.images),
        "--tokenizer-model",
        str(tokenizer_path),
        "--output",
        str(output),
        *more,
    ]


def test_the_tool_prints_a_summary_and_refuses_to_overwrite(mmc4, shards, tokenizer_path, tmp_path):
    command = tool(mmc4, shards, tokenizer_path, tmp_path / "corpus")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "documents" in done.stdout
    assert done.stderr == ""
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "use --overwrite" in again.stderr
    assert "Traceback" not in again.stderr
    subprocess.run([*command, "--overwrite"], cwd=ROOT, capture_output=True, check=True)
    assert Corpus.open(tmp_path / "corpus").num_documents > 0


def test_a_locale_without_utf8_changes_no_byte(mmc4, tokenizer_path, tmp_path, record):
    name = "caf\u00e9.png"
    mmc4.add_image(name)
    shard = mmc4.add_shard("s.jsonl", [record(["\u6f22\u5b57 caf\u00e9"], [(name, 0, 0.5), ("\u00fc.png", 0, 0.5)])])
    preprocess(config(mmc4, [shard], tokenizer_path, tmp_path / "here"))
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    # An open() of ours without an encoding is an error; matplotlib's, when it first looks for fonts, are not ours.
    code = (
        "import runpy, sys, warnings, matplotlib.font_manager; warnings.simplefilter('error', EncodingWarning); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = tool(mmc4, [shard], tokenizer_path, tmp_path / "there")[1:]
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", code, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert tree_hash(tmp_path / "there") == tree_hash(tmp_path / "here")


def test_unusable_images_are_counted_by_reason_and_the_document_stays(mmc4, tokenizer_path, tmp_path, record):
    outside = mmc4.path / "secret.png"
    mmc4.add_image("good.png")
    outside.write_bytes((mmc4.images / "good.png").read_bytes())
    (mmc4.images / "page.jpg").write_bytes(b"<!DOCTYPE html><html>404</html>")
    (mmc4.images / "empty.jpg").write_bytes(b"")
    (mmc4.images / "bomb.png").write_bytes(png_header(20_000, 20_000))
    (mmc4.images / "large.png").write_bytes(png_header(9_000, 9_000))
    (mmc4.images / "folder.png").mkdir()
    (mmc4.images / "link.png").symlink_to(outside)
    (mmc4.images / "near.png").symlink_to(mmc4.images / "good.png")
    os.mkfifo(mmc4.images / "pipe.png")
    Image.new("RGB", (4, 4)).save(mmc4.images / "old.bmp")
    reasons = {
        "good.png": None,
        "page.jpg": "not an image",
        "empty.jpg": "not an image",
        "bomb.png": "too many pixels",
        "large.png": "too many pixels",
        "folder.png": "unreadable file",
        "link.png": "unsafe image name",
        "near.png": None,
        "pipe.png": "unreadable file",
        "old.bmp": "not an image",
        "absent.png": "missing file",
        "good.png/x": "missing file",
        "x" * 300: "unreadable file",
        "../secret.png": "unsafe image name",
        str(outside): "unsafe image name",
    }
    shard = mmc4.add_shard("s.jsonl", [record(["One."], [(name, 0, 0.3) for name in reasons])])
    summary = preprocess(config(mmc4, [shard], tokenizer_path, tmp_path / "corpus", max_rejected_image_share=1.0))
    rejects = [json.loads(line) for line in (tmp_path / "corpus" / "rejects.jsonl").read_text().splitlines()]
    assert {reject["image_name"]: reject["reason"] for reject in rejects} == {
        name: reason for name, reason in reasons.items() if reason
    }
    assert summary.corpus.num_documents == 1
    assert [summary.corpus.image_source(image) for image in range(2)] == [
        "s.jsonl:1 image 0 (good.png)",
        "s.jsonl:1 image 7 (near.png)",
    ]
    assert summary.totals.rejected_images.total() == len(reasons) - 2


def test_pixel_and_byte_limits_are_exact(mmc4):
    data = mmc4.add_image("a.png", 20, 10)
    assert probe_image(data, 200) == (20, 10)
    with pytest.raises(ImageFileError, match="too many pixels: 20 x 10; the limit is 199"):
        probe_image(data, 199)
    assert ImageFolder(mmc4.images, max_bytes=len(data)).read("a.png") == data
    with pytest.raises(ImageFileError, match=f"file too large: {len(data)} bytes"):
        ImageFolder(mmc4.images, max_bytes=len(data) - 1).read("a.png")


def test_a_wrong_image_folder_is_an_error_and_not_an_empty_corpus(mmc4, shards, tokenizer_path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    job = PreprocessConfig(
        input=tuple(shards),
        image_root=tmp_path / "elsewhere",
        tokenizer_model=tokenizer_path,
        output=tmp_path / "corpus",
    )
    with pytest.raises(ConfigError, match=r"images cannot be used \(100%.*\): \d+ missing file; .*elsewhere right"):
        preprocess(job)
    assert not (tmp_path / "corpus").exists()


def test_inputs_are_checked_before_anything_is_read(mmc4, shards, tokenizer_path, tmp_path):
    with pytest.raises(ConfigError, match=r"1 of 6 inputs are no files: .*absent.jsonl"):
        config(mmc4, [*shards, mmc4.path / "absent.jsonl"], tokenizer_path, tmp_path / "corpus")
    with pytest.raises(ConfigError, match="more than once: docs_shard_0_v2.jsonl"):
        config(mmc4, [*shards, mmc4.path / "images" / ".." / shards[0].name], tokenizer_path, tmp_path / "corpus")
    given = {"input": tuple(shards), "tokenizer_model": tokenizer_path, "output": tmp_path / "corpus"}
    with pytest.raises(ConfigError, match="is not a folder, and not a .tar file"):
        PreprocessConfig(**given, image_root=tmp_path / "no")
    with pytest.raises(ConfigError, match="image_root is not given; shards of format mmc4 name images"):
        PreprocessConfig(**given)
    with pytest.raises(ConfigError, match="no input: give --input"):
        PreprocessConfig(**given | {"input": ()}, image_root=mmc4.images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "mmc5"}, "format = 'mmc5' is unknown; known are .*mmc4"),
        ({"num_workers": 0}, "num_workers = 0; at least 1"),
        ({"ray_address": "auto"}, "ray_address = auto has no meaning for engine local"),
        ({"max_rejected_image_share": 1.5}, r"= 1.5 is outside \[0, 1\]"),
        ({"max_image_pixels": 0}, "image limits must be at least 1"),
        ({"resize_short_side": -1}, "resize_short_side = -1 is negative"),
        ({"jpeg_quality": 101}, r"jpeg_quality = 101 is outside \[1, 100\]"),
    ],
)
def test_settings_that_make_no_sense_are_refused(mmc4, shards, tokenizer_path, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        config(mmc4, shards, tokenizer_path, tmp_path / "corpus", **change)


def test_a_format_that_brings_its_images_needs_no_folder(mmc4, tokenizer_path, tmp_path, monkeypatch):
    """A format of this test's own: one document per file, which is the image."""

    def read(path: Path, name: str):
        data, source = path.read_bytes(), Source(name, 1)
        image = ImageSegment("itself", 0, 0, 1.0, ImageKind.MATCHED, data)
        unread = ImageSegment("elsewhere", 1, 0, 1.0, ImageKind.MATCHED)
        yield Document((TextSegment("One."),), (image, unread), source)

    monkeypatch.setitem(FORMATS, "picture", Format(read, brings_images=True, suffixes=(".png",)))
    data = mmc4.add_image("a.png")
    given = {"input": (mmc4.images / "a.png",), "tokenizer_model": tokenizer_path, "format": "picture"}
    summary = preprocess(PreprocessConfig(**given, output=tmp_path / "corpus"))
    assert summary.corpus.image_bytes(0) == data
    assert summary.totals.rejected_images == {"missing file": 1}
    with pytest.raises(ConfigError, match="shards of format picture bring their images; leave it out"):
        PreprocessConfig(**given, output=tmp_path / "corpus", image_root=mmc4.images)


def test_inputs_of_equal_name_are_told_apart():
    assert input_names([Path("/d/a/0.jsonl"), Path("/d/b/0.jsonl")]) == ["a/0.jsonl", "b/0.jsonl"]
    assert input_names([Path("/d/a/0.jsonl")]) == ["0.jsonl"]


def test_real_documents(shared_mmc4, tokenizer_path, tokenizer, tmp_path):
    shards = sorted((shared_mmc4 / "data").glob("*.zip"))
    summary = preprocess(
        PreprocessConfig(
            input=tuple(shards),
            image_root=shared_mmc4 / "images",
            tokenizer_model=tokenizer_path,
            output=tmp_path / "corpus",
            num_workers=2,
        )
    )
    assert check_against_shards(summary.corpus, tokenizer, shards, shared_mmc4 / "images") == 0
    assert summary.totals.rejected_documents.total() == 0


def test_input_name_that_is_not_utf8_is_refused_first(mmc4, tokenizer_path, tmp_path):
    shard = write_shards(mmc4)[0]
    odd = Path(os.fsdecode(os.fsencode(str(shard.parent)) + b"/odd\xff.jsonl"))
    os.rename(shard, odd)
    with pytest.raises(ConfigError, match="names of inputs that are not UTF-8"):
        config(mmc4, [odd], tokenizer_path, tmp_path / "c")
