"""Preprocessing from shards to corpus.

Oracles: an independent reading of the shards with json and Pillow; byte equality between runs with one worker, several
workers, and interruptions; rejects listed by hand.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.corpus import Corpus
from lcl_megatron.data.image_folder import ImageFileError, ImageFolder, probe_image
from lcl_megatron.data.preprocess import PreprocessConfig, input_names, preprocess
from lcl_megatron.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def tree_hash(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 64)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def shards(mmc4, record) -> list[Path]:
    """Five shards of uneven size; every third document has a missing image, one shard is empty."""
    paths = []
    for shard, count in enumerate([7, 1, 0, 12, 5]):
        lines = []
        for number in range(count):
            names = [f"{shard}_{number}_{index}.png" for index in range(1 + number % 3)]
            for index, name in enumerate(names):
                if number != 4 and (number + index) % 3 != 2:
                    mmc4.add_image(name, 8 + number, 9 + index, seed=shard * 100 + number)
            if number == 4:
                names = ["never_there.png"]
            texts = [f"A cat sees {number} things.", "", "The old dog paints <image>."]
            lines.append(record(texts, [(name, index % 3, 0.2 + index / 10) for index, name in enumerate(names)]))
        lines.insert(1, b"{broken")
        paths.append(mmc4.add_shard(f"docs_shard_{shard}_v2.jsonl" + (".zip" if shard % 2 else ""), lines))
    return paths


def config(mmc4, shards: list[Path], tokenizer_path: Path, output: Path, **changes: object) -> PreprocessConfig:
    return PreprocessConfig(
        input=tuple(shards), image_root=mmc4.images, tokenizer_model=tokenizer_path, output=output, **changes
    )


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
    lines: list[str] = []
    summary = preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus"), lines.append)
    missing = check_against_shards(summary.corpus, tokenizer, shards, mmc4.images)
    assert missing > 0
    assert summary.totals.rejected_images == {"missing file": missing}
    records = sum(len(read_independently(shard)) for shard in shards)
    assert records > summary.corpus.num_documents
    assert summary.totals.rejected_documents == {
        "malformed JSON": 5,
        "no images": records - summary.corpus.num_documents,
    }
    assert len(lines) == 5
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


def test_the_number_of_workers_changes_no_byte(mmc4, shards, tokenizer_path, tmp_path):
    hashes = []
    for workers in (1, 2, 4):
        output = tmp_path / f"corpus{workers}"
        preprocess(config(mmc4, shards, tokenizer_path, output, num_workers=workers))
        hashes.append(tree_hash(output))
    assert hashes[0] == hashes[1] == hashes[2]


def test_an_interrupted_run_goes_on_where_it_stopped(mmc4, shards, tokenizer_path, tmp_path):
    class Stop(Exception):
        pass

    def stop_after_two(line: str) -> None:
        if line.startswith("[2/"):
            raise Stop

    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "whole"))
    job = config(mmc4, shards, tokenizer_path, tmp_path / "corpus")
    with pytest.raises(Stop):
        preprocess(job, stop_after_two)
    assert not (tmp_path / "corpus").exists()
    lines: list[str] = []
    preprocess(job, lines.append)
    assert [line.split()[0] for line in lines] == ["taking", "[3/5]", "[4/5]", "[5/5]"]
    assert tree_hash(tmp_path / "corpus") == tree_hash(tmp_path / "whole")


def test_a_changed_input_is_read_again(mmc4, shards, tokenizer_path, tmp_path, record):
    def stop(line: str) -> None:
        raise RuntimeError(line)

    job = config(mmc4, shards, tokenizer_path, tmp_path / "corpus")
    with pytest.raises(RuntimeError):
        preprocess(job, stop)
    mmc4.add_image("new.png")
    mmc4.add_shard(shards[0].name, [record(["Replaced."], [("new.png", 0, 0.5)])])
    summary = preprocess(job)
    assert summary.corpus.image_source(0) == f"{shards[0].name}:1 image 0 (new.png)"


def test_killed_runs_end_in_the_same_bytes(mmc4, shards, tokenizer_path, tmp_path):
    """The tool, with two workers, is killed with its whole process group at five moments, then run to its end."""
    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "whole"))
    command = tool(mmc4, shards, tokenizer_path, tmp_path / "corpus", "--num-workers", "2")
    for wait in range(1, 6):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)
        for _ in range(wait):
            process.stderr.readline()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "corpus").exists():
            break
        # The lock ends with the last process of the group, a moment after the kill.
        time.sleep(0.2)
    if not (tmp_path / "corpus").exists():
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert tree_hash(tmp_path / "corpus") == tree_hash(tmp_path / "whole")


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
    assert "[5/5]" in done.stderr
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
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "warn_default_encoding",
            "-W",
            "error::EncodingWarning",
            *tool(mmc4, [shard], tokenizer_path, tmp_path / "there")[1:],
        ],
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
    with pytest.raises(ConfigError, match=r"images cannot be used \(100%.*missing file.*elsewhere right"):
        preprocess(job)
    assert not (tmp_path / "corpus").exists()


def test_inputs_are_checked_before_anything_is_read(mmc4, shards, tokenizer_path, tmp_path):
    with pytest.raises(ConfigError, match=r"1 of 6 inputs are no files: .*absent.jsonl"):
        config(mmc4, [*shards, mmc4.path / "absent.jsonl"], tokenizer_path, tmp_path / "corpus")
    with pytest.raises(ConfigError, match="more than once: docs_shard_0_v2.jsonl"):
        config(mmc4, [*shards, mmc4.path / "images" / ".." / shards[0].name], tokenizer_path, tmp_path / "corpus")
    with pytest.raises(ConfigError, match="is not a folder"):
        PreprocessConfig(
            input=tuple(shards), image_root=tmp_path / "no", tokenizer_model=tokenizer_path, output=tmp_path / "corpus"
        )


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
