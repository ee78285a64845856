"""Batches of images through every backend.

Oracles: Pillow for pixels, each image alone for batches, the kind of damage for errors, a count of what is held at the
same time for the memory budget. The backends of DALI are compared with the CPU's.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from lcl_megatron.config import ConfigError
from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.decoding import dali_decoder
from lcl_megatron.data.decoding.dali_decoder import DaliDecoder, can_decode
from lcl_megatron.data.decoding.image_backend import make_decoder, resolve_image_backend
from lcl_megatron.data.decoding.image_decoder import ImageDecoder, MemoryBudget
from lcl_megatron.data.decoding.image_probe import MAX_SCANS, ImageError, ImageLimits, read_header
from lcl_megatron.data.decoding.images import Box, TrainingTransform, decode_crop, decode_rgb, resize
from tests.data.decoding.test_images import CORRUPT, encode, photo

SIZE = 48
TRANSFORM = TrainingTransform(size=SIZE, seed=4)
needs_dali = pytest.mark.skipif(not dali_decoder.has_dali(), reason="DALI is not installed")
BACKENDS = [
    "cpu",
    pytest.param("dali_cpu", marks=needs_dali),
    pytest.param("dali", marks=[needs_dali, pytest.mark.gpu]),
]
DALI_MEAN_TOLERANCE = 1.5
"""Of 255, for each image. Seen on the CPU: 0.2, and 1.0 for dithered black and white."""


def shades() -> Image.Image:
    """A picture without the noise that chroma subsampling loses."""
    return photo(97, 61).resize((20, 13)).resize((97, 61), Image.Resampling.BICUBIC)


def good_images() -> list[bytes]:
    """Images of all formats and many modes."""
    image = photo(97, 61)
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    frames = [image.rotate(90), image.rotate(180)]
    encoded = [
        encode(image, "JPEG", quality=85),
        encode(photo(50, 120), "JPEG", progressive=True),
        encode(image.convert("L"), "JPEG"),
        encode(image.convert("CMYK"), "JPEG"),
        encode(deep, "PNG"),
        encode(image, "GIF", save_all=True, append_images=frames),
        encode(image, "WEBP", save_all=True, append_images=frames),
    ]
    for name in ("PNG", "WEBP", "BMP", "TIFF", "JPEG2000"):
        encoded += [encode(image.convert(mode), name) for mode in ("RGB", "RGBA")]
    for name in ("PNG", "TIFF", "BMP", "GIF"):
        encoded += [encode(image.convert(mode), name) for mode in ("L", "P", "1")]
    return encoded + [encode(image.convert("LA"), name) for name in ("PNG", "TIFF", "JPEG2000")]


@pytest.fixture
def decoder_of() -> Iterator[Callable[..., ImageDecoder]]:
    """Makes decoders and closes them."""
    made = []

    def make(backend: str, transform: TrainingTransform = TRANSFORM, num_threads: int = 2) -> ImageDecoder:
        made.append(make_decoder(backend, transform, num_threads))
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_do_not_depend_on_the_batch(backend: str, decoder_of: Callable[..., ImageDecoder]) -> None:
    encoded = good_images()
    whole = decoder_of(backend).submit(encoded, range(len(encoded))).result()
    assert whole.errors == (None,) * len(encoded)
    assert whole.pixels.shape == (len(encoded), 3, SIZE, SIZE)
    assert whole.pixels.dtype == torch.uint8
    assert whole.pixels.is_cuda == (backend == "dali")
    for num_threads, part, end in ((0, 1, 9), (3, 11, len(encoded))):
        decoder = decoder_of(backend, num_threads=num_threads)
        for begin in range(0, end, part):
            keys = list(range(len(encoded)))[begin : begin + part]
            found = decoder.submit(encoded[begin : begin + part], keys).result()
            assert torch.equal(found.pixels, whole.pixels[begin : begin + part])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_image_is_blank_and_the_others_do_not_notice(
    backend: str, decoder_of: Callable[..., ImageDecoder]
) -> None:
    good = good_images()[:12]
    expected = decoder_of(backend).submit(good, range(len(good))).result()
    encoded, keys, reasons = [], [], []
    for index, (data, reason) in enumerate(CORRUPT.values()):
        encoded += [good[index % len(good)], data]
        keys += [index % len(good), 1000 + index]
        reasons.append(reason)
    found = decoder_of(backend).submit(encoded, keys).result()
    assert found.errors[::2] == (None,) * len(CORRUPT)
    assert torch.equal(found.pixels[::2], expected.pixels[keys[::2]])
    blank = torch.tensor(BLANK_PIXEL, dtype=torch.uint8)[:, None, None]
    assert (found.pixels[1::2].cpu() == blank).all()
    for error, reason in zip(found.errors[1::2], reasons, strict=True):
        with pytest.raises(ImageError, match=reason):
            raise ImageError(error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_nothing(backend: str, decoder_of: Callable[..., ImageDecoder]) -> None:
    images = decoder_of(backend).submit([], []).result()
    assert images.errors == ()
    assert images.pixels.shape == (0, 3, SIZE, SIZE)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_dali_agrees_with_the_cpu(backend: str, decoder_of: Callable[..., ImageDecoder]) -> None:
    encoded = good_images()
    keys = range(len(encoded))
    found = decoder_of(backend).submit(encoded, keys).result().pixels.float().cpu()
    expected = decoder_of("cpu").submit(encoded, keys).result().pixels.float()
    difference = (found - expected).abs()
    assert difference.mean(dim=(1, 2, 3)).max() <= DALI_MEAN_TOLERANCE
    assert difference.mean() <= 0.5
    assert difference.max() <= 16


@needs_dali
def test_dali_decodes_what_it_is_given_and_leaves_the_rest() -> None:
    """Of the good images, those that take the way over Pillow are of these kinds, and no others."""
    left = []
    for data in good_images():
        header = read_header(data, ImageLimits())
        if not can_decode(data, header):
            left.append((header.format, header.mode))
    assert sorted(set(left)) == [
        ("GIF", "L"),
        ("GIF", "P"),
        ("JPEG", "CMYK"),
        ("JPEG2000", "LA"),
        ("PNG", "I;16"),
        ("TIFF", "1"),
        ("TIFF", "LA"),
        ("TIFF", "P"),
        ("WEBP", "RGB"),
    ]


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}]
)
@pytest.mark.parametrize(("mode", "size"), [("RGB", (97, 61)), ("RGB", (8, 8)), ("RGB", (1, 1)), ("L", (33, 70))])
def test_simplejpeg_and_pillow_decode_to_the_same_pixels(
    options: dict[str, object], mode: str, size: tuple[int, int]
) -> None:
    data = encode(photo(*size).convert(mode), "JPEG", **options)
    assert read_header(data, ImageLimits()).plain_jpeg
    assert np.array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_jpeg_of_rgb_and_of_cmyk() -> None:
    for data, plain in ((encode(photo(50, 40), "JPEG", keep_rgb=True), True), (good_images()[3], False)):
        assert read_header(data, ImageLimits()).plain_jpeg == plain
        assert np.array_equal(decode_rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_what_libjpeg_warns_of_is_for_pillow_to_judge() -> None:
    """Wrong bits inside a scan: the same pixels as Pillow's, or an error where Pillow has one."""
    data = encode(photo(120, 90), "JPEG", quality=85)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        damaged = np.frombuffer(data, dtype=np.uint8).copy()
        damaged[rng.integers(len(data) // 4, len(data), rng.integers(1, 30))] ^= np.uint8(1 << rng.integers(8))
        try:
            with Image.open(io.BytesIO(damaged.tobytes())) as image:
                expected = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError):
            expected = None
        outcomes.add(expected is not None)
        if expected is None:
            with pytest.raises(ImageError):
                decode_rgb(damaged.tobytes())
        else:
            assert np.array_equal(decode_rgb(damaged.tobytes()), expected)
    assert outcomes == {False, True}


@pytest.mark.parametrize("index", range(29))
def test_crop_is_a_part_of_the_whole_image(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = good_images()[index]
    header = read_header(data, ImageLimits())
    box = Box(3, 5, header.height - 7, header.width - 9)
    whole = decode_rgb(data)
    monkeypatch.setattr("lcl_megatron.data.decoding.images.BAND_PIXELS", 300)
    found = decode_crop(data, header, box)
    assert found.flags.c_contiguous
    assert np.array_equal(found, whole[3 : 3 + box.height, 5 : 5 + box.width])


def test_resize_is_torchs_interpolation() -> None:
    pixels = np.asarray(photo(97, 61))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, size=(30, 40), mode="bicubic", antialias=True)
    assert torch.equal(resize(pixels, 30, 40), expected[0])


def test_crops_of_many_keys_are_those_of_each() -> None:
    keys = [0, 5, (3 << 40) + 17, 1 << 62]
    for key, draw in zip(keys, TRANSFORM.draw(keys), strict=True):
        for height, width in ((375, 500), (40, 4000), (1, 1)):
            assert TRANSFORM.box(key, height, width, draw) == TRANSFORM.box(key, height, width)


def test_jpeg_of_too_many_scans_is_refused() -> None:
    data = encode(photo(120, 90), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * (MAX_SCANS + 1) + data[-2:]
    with pytest.raises(ImageError, match=rf"\d+ JPEG scans, more than {MAX_SCANS}"):
        read_header(bomb, ImageLimits())


@pytest.mark.parametrize(
    ("name", "options", "bytes_per_pixel"),
    [("JPEG", {}, 7), ("JPEG", {"progressive": True}, 13), ("PNG", {}, 7), ("WEBP", {}, 24), ("JPEG2000", {}, 40)],
)
def test_image_that_takes_too_much_memory_is_refused(
    name: str, options: dict[str, object], bytes_per_pixel: int
) -> None:
    data = encode(photo(100, 90), name, **options)
    assert read_header(data, ImageLimits(max_memory=9000 * bytes_per_pixel)).memory == 9000 * bytes_per_pixel
    with pytest.raises(ImageError, match=f"100 x 90 pixels of {name} take 0 MB to decode, more than 0"):
        read_header(data, ImageLimits(max_memory=9000 * bytes_per_pixel - 1))


def test_threads_together_stay_within_the_budget() -> None:
    budget, held, largest, lock = MemoryBudget(10), 0, 0, threading.Lock()

    def work(seed: int) -> None:
        nonlocal held, largest
        for amount in np.random.default_rng(seed).integers(1, 11, 40).tolist():
            with budget.hold(amount):
                with lock:
                    held += amount
                    largest = max(largest, held)
                time.sleep(0.0002)
                with lock:
                    held -= amount

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert held == 0
    assert 7 <= largest <= 10


def test_reading_errors_reach_the_caller(decoder_of: Callable[..., ImageDecoder]) -> None:
    class Broken(list[bytes]):
        def __getitem__(self, index: int) -> bytes:
            raise OSError(f"no disk for {index}")

    pending = decoder_of("cpu", num_threads=1).submit(Broken([b""] * 3), range(3))
    with pytest.raises(OSError, match="no disk for 0"):
        pending.result()


@needs_dali
def test_dali_that_decodes_nothing_is_an_error_and_no_slow_way_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bilevel TIFF, which DALI cannot decode, is declared decodable."""
    monkeypatch.setattr(dali_decoder, "can_decode", lambda data, header: True)
    encoded = [encode(photo(20 + i, 30).convert("1"), "TIFF") for i in range(dali_decoder.MIN_FAILURES)]
    decoder = DaliDecoder(TRANSFORM)
    with pytest.raises(RuntimeError, match="DALI decodes none of 8 images that Pillow decodes; set --image-backend"):
        decoder.submit(encoded, range(8))
    few = decoder.submit(encoded[:3] + [encode(shades(), "PNG")], range(4)).result()
    assert few.errors == (None,) * 4


def test_auto_is_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_image_backend("auto") == "cpu"
    assert resolve_image_backend("cpu") == "cpu"
    monkeypatch.setattr("lcl_megatron.data.decoding.image_backend.has_dali", lambda: True)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        resolve_image_backend("dali")
