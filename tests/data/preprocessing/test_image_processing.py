"""What becomes of images on their way into a corpus.

Oracles: Pillow's own resize and decoder, SHA-256 of hashlib, sizes by arithmetic, the decoder of training.
"""

from __future__ import annotations

import hashlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from lcl_megatron.data.decoding.images import decode_rgb, resize
from lcl_megatron.data.document import ImageKind, ImageSegment
from lcl_megatron.data.image_stores.image_folder import ImageFileError
from lcl_megatron.data.preprocessing.image_processing import ImageRules
from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.storage.corpus_part import StoredImage
from tests.data.corpora import jpeg
from tests.data.preprocess_runs import config, tree_hash

PLACE = ImageSegment("a.jpg", 0, 0, 1.0, ImageKind.MATCHED)
LIMITS = {"max_bytes": 1 << 20, "max_pixels": 1 << 20}
SMALLER = ImageRules(**LIMITS, resize_short_side=32)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float64)


def pillow_jpeg(image: Image.Image) -> bytes:
    """Pillow's encoding. Its resize agrees with training's within 1/255, which may move a coefficient by a step."""
    return encode(image, "JPEG", quality=90, subsampling="4:4:4")


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(width, height, seed))).convert("RGB")


def test_an_image_stays_as_it_is_unless_it_is_larger():
    for data in (jpeg(200, 150, 0), encode(smooth(90, 80), "PNG"), encode(smooth(90, 80), "WEBP")):
        stored = ImageRules(**LIMITS).store(PLACE, data)
        width, height = Image.open(io.BytesIO(data)).size
        digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
        assert stored == StoredImage(PLACE, data, width, height, digest)
    for size in ((32, 32), (32, 500), (500, 32), (10, 400)):
        data = jpeg(*size, 1)
        assert SMALLER.store(PLACE, data).data == data


@pytest.mark.parametrize("size", [(200, 150), (150, 200), (33, 33), (97, 400), (640, 33)])
def test_a_larger_image_is_what_pillow_would_make_of_it(size: tuple[int, int]):
    data = jpeg(*size, 2)
    stored = SMALLER.store(PLACE, data)
    expected = tuple(round(side * 32 / min(size)) for side in size)
    assert (stored.width, stored.height) == expected == Image.open(io.BytesIO(stored.data)).size
    assert stored.source_bytes == len(data)
    assert stored.source_hash == int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    image = Image.open(io.BytesIO(stored.data))
    assert image.format == "JPEG"
    resized = Image.open(io.BytesIO(data)).convert("RGB").resize(expected, Image.Resampling.BICUBIC)
    assert np.abs(pixels(stored.data) - pixels(pillow_jpeg(resized))).mean() < 1.5


def test_quality_is_the_one_asked_for_and_chroma_is_not_subsampled():
    data = encode(Image.effect_noise((200, 150), 90).convert("RGB"), "PNG")
    sizes = []
    for quality in (50, 75, 90, 100):
        stored = ImageRules(**LIMITS, resize_short_side=100, jpeg_quality=quality).store(PLACE, data)
        reference = encode(Image.open(io.BytesIO(stored.data)), "JPEG", quality=quality, subsampling="4:4:4")
        image, stock = Image.open(io.BytesIO(stored.data)), Image.open(io.BytesIO(reference))
        assert image.quantization == stock.quantization
        assert image.layer == stock.layer
        sizes.append(len(stored.data))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("kind", ["rotated", "palette", "alpha", "grey", "animation"])
def test_what_training_sees_of_unusual_images_is_kept(kind: str):
    """EXIF orientation ignored, palettes and alpha turned into RGB before the resize, the first of several frames."""
    image = smooth(120, 80)
    if kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encode(image, "JPEG", exif=exif, quality=95)
    elif kind == "palette":
        data = encode(image.convert("P"), "PNG", transparency=3)
    elif kind == "alpha":
        image.putalpha(Image.radial_gradient("L").resize(image.size))
        data = encode(image, "PNG")
    elif kind == "grey":
        data = encode(image.convert("L"), "JPEG")
    else:
        data = encode(image, "GIF", save_all=True, append_images=[smooth(120, 80, 5)])
    stored = SMALLER.store(PLACE, data)
    assert (stored.width, stored.height) == (48, 32)
    seen = decode_rgb(data, 1 << 20)
    resized = Image.fromarray(resize(seen, 32, 48).permute(1, 2, 0).numpy())
    assert np.array_equal(decode_rgb(stored.data, 1 << 20), pixels(pillow_jpeg(resized)))
    resized = Image.fromarray(seen).resize((48, 32), Image.Resampling.BICUBIC)
    assert np.abs(decode_rgb(stored.data, 1 << 20) - pixels(pillow_jpeg(resized))).mean() < 1.5


def test_the_same_bytes_give_the_same_bytes():
    data = jpeg(300, 200, 3)
    assert SMALLER.store(PLACE, data) == SMALLER.store(PLACE, data)


def test_a_strip_too_long_for_a_jpeg_is_kept():
    data = encode(Image.new("RGB", (2100, 1)).resize((70_000, 2)), "PNG")
    assert ImageRules(**LIMITS, resize_short_side=1).store(PLACE, data).source_bytes is not None
    long = encode(Image.new("RGB", (140_000, 2)), "PNG")
    stored = ImageRules(**LIMITS, resize_short_side=1).store(PLACE, long)
    assert (stored.data, stored.width, stored.height) == (long, 140_000, 2)


def test_limits_hold_for_images_that_records_bring():
    data = jpeg(50, 40, 0)
    with pytest.raises(ImageFileError, match=f"file too large: {len(data)} bytes; the limit is {len(data) - 1}"):
        ImageRules(max_bytes=len(data) - 1, max_pixels=10_000).store(PLACE, data)
    with pytest.raises(ImageFileError, match="too many pixels: 50 x 40; the limit is 1999"):
        ImageRules(max_bytes=len(data), max_pixels=1999).store(PLACE, data)
    with pytest.raises(ImageFileError, match="not an image"):
        ImageRules(**LIMITS).store(PLACE, b"")


def test_only_a_full_decode_finds_a_file_that_is_cut_short():
    data = jpeg(60, 50, 4)
    cut = data[: len(data) // 2]
    assert ImageRules(**LIMITS).store(PLACE, cut).data == cut
    assert ImageRules(**LIMITS, decode=True).store(PLACE, data).data == data
    for rules in (ImageRules(**LIMITS, decode=True), SMALLER):
        with pytest.raises(ImageFileError, match="cannot be decoded: cannot be decoded: OSError: .*truncated"):
            rules.store(PLACE, cut)


def test_a_corpus_of_smaller_images(mmc4, record, tokenizer_path, tmp_path):
    """Hashes of the sources, sizes of the stored files, the same bytes from two processes."""
    names = ["large.jpg", "again.jpg", "small.jpg", "cut.jpg"]
    large, small = jpeg(200, 100, 0), jpeg(40, 20, 1)
    for name, data in zip(names, (large, large, small, large[:900]), strict=True):
        (mmc4.images / name).write_bytes(data)
    shards = [
        mmc4.add_shard(f"{number}.jsonl", [record(["One."], [(name, 0, 0.5) for name in names])]) for number in range(2)
    ]
    rules = {"resize_short_side": 50, "jpeg_quality": 85, "check_images": "decode"}
    summary = preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus", **rules))
    corpus = summary.corpus
    assert corpus.image_width.tolist() == [100, 100, 40] * 2
    assert corpus.image_height.tolist() == [50, 50, 20] * 2
    assert [Image.open(io.BytesIO(corpus.image_bytes(i))).size for i in range(3)] == [(100, 50), (100, 50), (40, 20)]
    hashes = [int.from_bytes(hashlib.sha256(data).digest()[:8], "little") for data in (large, large, small)]
    assert corpus.image_hash.tolist() == hashes * 2
    assert corpus.manifest["counts"]["duplicate_images"] == 4
    assert corpus.manifest["counts"]["resized_images"] == 4
    assert corpus.manifest["rejected"]["images"] == {"cannot be decoded": 2}
    rejects = [json.loads(line) for line in (corpus.path / "rejects.jsonl").read_text().splitlines()]
    assert {(r["image_name"], r["reason"]) for r in rejects} == {("cut.jpg", "cannot be decoded")}
    source = 2 * (2 * len(large) + len(small))
    assert f"images that repeat an earlier one: 4\n  images made smaller: 4 ({source:,} bytes" in str(summary)
    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "two", **rules, num_workers=2))
    assert tree_hash(tmp_path / "two") == tree_hash(tmp_path / "corpus")
