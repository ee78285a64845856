"""How many images a core turns into pixels, against what OpenCLIP's training script does.

python benchmarks/images.py

The reference is OpenCLIP's transform (RandomResizedCrop of Pillow images with bicubic interpolation, RGB, scaling to
[0, 1], normalisation) written with Pillow and numpy, which is all that torchvision does there. Both sides end with
normalised float32. Times are processor times, medians over several rounds in which both take turns.

The last line is one JSON object: ``speedup_256`` and so on, for JPEG of that width; ``max_abs_diff`` and
``mean_abs_diff``, in 1/255, from Pillow's resize of the same crop of the same pixels, ``max_abs_diff_enlarged`` where
a side of the crop is enlarged; ``dali_cpu_mean_diff``, that of DALI's CPU operators from ours;
``end_to_end_speedup_256`` and so on, of reading, decoding, composing and collating a corpus against webdataset reading
tar files of the same images and captions (without the transfer from its worker processes), and
``end_to_end_speedup``, their median.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from photos import encode, photo
from PIL import Image

from lcl_megatron.config import DataConfig
from lcl_megatron.config.image import CLIP_MEAN, CLIP_STD
from lcl_megatron.data.decoding.dali_decoder import DaliDecoder, has_dali
from lcl_megatron.data.decoding.image_decoder import CpuDecoder
from lcl_megatron.data.decoding.image_probe import ImageLimits, read_header
from lcl_megatron.data.decoding.images import TrainingTransform, decode_crop, resize
from lcl_megatron.data.document import ImageKind, ImageSegment, Source
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument, StoredImage
from lcl_megatron.data.storage.corpus_writer import write_corpus
from lcl_megatron.data.tokenizer import Tokenizer, train_tokenizer

SIZE = 224
NUM_LATENTS = 196
MEAN = np.array(CLIP_MEAN, dtype=np.float32)
STD = np.array(CLIP_STD, dtype=np.float32)
SCALE = torch.tensor(1 / (STD * 255)).repeat(SIZE)
SHIFT = torch.tensor(-MEAN / STD).repeat(SIZE)
NORMALISE_AT_ONCE = 4
ROWS, MICRO_BATCH = 32, 8
"""Rows of a step, and of a micro-batch, of the end-to-end runs."""
"""Images that stay in the cache of a core."""
CAPTION = "a picture of shapes and words that someone drew"
CONTEXT_LENGTH = 77


def openclip_crop(width: int, height: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) as ``RandomResizedCrop(scale=(0.9, 1)).get_params`` draws them."""
    for _ in range(10):
        area = width * height * random.uniform(0.9, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return 0, 0, height, width


def openclip_transform(image: Image.Image) -> np.ndarray:
    """Return (3, size, size) float32: resized crop, RGB, ToTensor, Normalize, as torchvision does them with Pillow."""
    top, left, height, width = openclip_crop(*image.size)
    cropped = image.crop((left, top, left + width, top + height))
    rgb = cropped.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
    pixels = np.array(rgb).transpose(2, 0, 1).copy()  # ToTensor makes channels first and contiguous
    scaled = torch.from_numpy(pixels).to(torch.float32).div(255)
    return scaled.sub_(torch.from_numpy(MEAN)[:, None, None]).div_(torch.from_numpy(STD)[:, None, None]).numpy()


def reference(encoded: list[bytes]) -> torch.Tensor:
    """Decode a batch as OpenCLIP does, (N, 3, size, size) float32."""
    return torch.from_numpy(np.stack([openclip_transform(Image.open(io.BytesIO(data))) for data in encoded]))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels as the model sees them; in training the GPU does this."""
    rows = pixels.permute(0, 2, 3, 1).reshape(len(pixels), SIZE, SIZE * 3)  # channels are last in memory: no copy
    return torch.addcmul(SHIFT, rows.float(), SCALE).view(len(pixels), SIZE, SIZE, 3).permute(0, 3, 1, 2)


def compare(ours: Callable[[], int], theirs: Callable[[], int], rounds: int) -> tuple[float, float]:
    """Return images per core-second of both, which take turns; each returns how many images it made."""
    speeds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, speed in zip((ours, theirs), speeds, strict=True):
            begin = time.process_time()
            count = function()
            speed.append(count / (time.process_time() - begin))
    return statistics.median(speeds[0]), statistics.median(speeds[1])


def decoding_speeds(encoded: list[bytes], rounds: int) -> tuple[float, float]:
    """Return images per core-second from bytes to normalised pixels, ours and OpenCLIP's."""
    decoder = CpuDecoder(TrainingTransform(SIZE, seed=0))
    keys = iter(range(1 << 40))

    def ours() -> int:
        images = decoder.submit(encoded, [next(keys) for _ in encoded]).result()
        return sum(len(normalised(part)) for part in images.pixels.split(NORMALISE_AT_ONCE))

    return compare(ours, lambda: len(reference(encoded)), rounds)


def differences(encoded: list[bytes]) -> dict[str, float]:
    """Compare our pixels with Pillow's of the same crop, and with DALI's."""
    transform = TrainingTransform(SIZE, seed=0)
    largest, means = {False: 0, True: 0}, []
    for key, data in enumerate(encoded):
        header = read_header(data, ImageLimits())
        box = transform.box(key, header.height, header.width)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        # Horizontally first, as all Pillow before version 12; newer ones begin with the cheaper direction.
        expected = crop.resize((SIZE, crop.height), Image.Resampling.BICUBIC).resize((SIZE, SIZE), 3)
        found = resize(decode_crop(data, header, box), SIZE, SIZE).permute(1, 2, 0).numpy()
        difference = np.abs(found.astype(int) - np.asarray(expected).astype(int))
        enlarged = min(box.height, box.width) < SIZE
        largest[enlarged] = max(largest[enlarged], int(difference.max()))
        means.append(float(difference.mean()))
    result = {
        "max_abs_diff": float(largest[False]),
        "max_abs_diff_enlarged": float(largest[True]),
        "mean_abs_diff": statistics.fmean(means),
    }
    if has_dali():
        keys = list(range(len(encoded)))
        decoder = DaliDecoder(transform)
        pixels = [d.submit(encoded, keys).result().pixels.float() for d in (decoder, CpuDecoder(transform))]
        result["dali_cpu_mean_diff"] = float((pixels[0] - pixels[1]).abs().mean())
    return result


def write_tar(path: Path, encoded: list[bytes]) -> None:
    """Write images and captions as img2dataset does."""
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(encoded):
            record = json.dumps({"key": f"{number:09}", "caption": CAPTION}).encode()
            for suffix, content in (("jpg", data), ("txt", CAPTION.encode()), ("json", record)):
                member = tarfile.TarInfo(f"{number:09}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def webdataset_batches(tar: Path, tokenizer: Tokenizer, batch_size: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Return OpenCLIP's pipeline of one epoch: read, decode by Pillow, transform, tokenize, batch."""
    import webdataset

    def tokens(text: str) -> torch.Tensor:
        ids = tokenizer.encode(text)[:CONTEXT_LENGTH]
        return torch.nn.functional.pad(torch.tensor(ids), (0, CONTEXT_LENGTH - len(ids)))

    return webdataset.DataPipeline(
        webdataset.SimpleShardList(str(tar)),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(bufsize=100, initial=100),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=lambda image: torch.from_numpy(openclip_transform(image)), text=tokens),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch_size, partial=True),
    )


def documents(encoded: list[bytes], tokenizer: Tokenizer) -> Iterator[EncodedDocument]:
    """Yield one document for each image and its caption."""
    for number, data in enumerate(encoded):
        image = StoredImage(ImageSegment(f"{number}.jpg", 0, 0, 0.5, ImageKind.MATCHED), data, 0, 0)
        yield EncodedDocument([tokenizer.encode(CAPTION)], [image], Source("pairs.jsonl", number + 1))


def end_to_end_speeds(encoded: list[bytes], folder: Path, rounds: int) -> tuple[float, float]:
    """Return images per core-second from disk to batches, ours and webdataset's."""
    tokenizer = train_tokenizer([CAPTION, "another text about nothing at all"], folder / "tokenizer.model", 290)
    write_tar(folder / "images.tar", encoded)
    corpus = Corpus.open(write_corpus(folder / "corpus", documents(encoded, tokenizer), tokenizer).path)
    config = dataclasses.replace(DataConfig(image_backend="cpu", num_workers=0), seq_length=2048)

    plan = Plan([corpus], config, NUM_LATENTS, ROWS, MICRO_BATCH, 1, seed=0)
    # In this thread, as webdataset's pipeline is: what threads prepare ahead would be charged to the other side.
    steps = iter(StepLoader(plan, 0, SIZE))

    def ours() -> int:
        count = 0
        for batch in next(steps).micro_batches:
            for part in batch.images.split(NORMALISE_AT_ONCE):
                normalised(part)
            count += batch.num_images
        return count

    def theirs() -> int:
        return sum(len(images) for images, _ in webdataset_batches(folder / "images.tar", tokenizer, 32))

    result = compare(ours, theirs, rounds)
    steps.close()
    return result


def main() -> None:
    """Read the flags, measure, print lines and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48, help="pictures of each size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024], help="widths, in pixels")
    parser.add_argument("--rounds", type=int, default=7, help="rounds whose median counts")
    parser.add_argument("--data-path", help="corpus whose JPEGs are read end to end, too")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, float] = {}
    pictures: dict[int, list[bytes]] = {}
    for size in flags.sizes:
        pictures[size] = [encode(photo(seed, size, size * 3 // 4), quality=85) for seed in range(flags.images)]
        ours, theirs = decoding_speeds(pictures[size], flags.rounds)
        kilobytes = sum(map(len, pictures[size])) / len(pictures[size]) / 1000
        print(f"{size} px, {kilobytes:.0f} kB: {ours:,.0f} images per core-second, OpenCLIP's {theirs:,.0f}")
        result |= {f"speedup_{size}": ours / theirs, f"images_per_s_{size}": ours, f"reference_{size}": theirs}
    result |= differences([data for encoded in pictures.values() for data in encoded])
    if flags.data_path:
        corpus = Corpus.open(flags.data_path)
        stored = (corpus.image_bytes(image) for image in range(min(corpus.num_images, 10 * flags.images)))
        pictures[0] = [data for data in stored if read_header(data, ImageLimits()).plain_jpeg]
    for size, encoded in pictures.items():
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = end_to_end_speeds(encoded * (1 + 256 // len(encoded)), Path(folder), flags.rounds)
        name = f"{size} px" if size else flags.data_path
        print(f"{name} from disk to batches: {ours:,.0f} images per core-second, webdataset's {theirs:,.0f}")
        result[f"end_to_end_speedup_{size}" if size else "end_to_end_speedup_data_path"] = ours / theirs
    ends = [value for name, value in result.items() if name.startswith("end_to_end")]
    result["end_to_end_speedup"] = statistics.median(ends)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
