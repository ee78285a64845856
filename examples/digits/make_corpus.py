"""Make a small interleaved data set out of scikit-learn's hand-written digits, in MMC4 layout.

python examples/digits/make_corpus.py --output digits

    digits/data/docs_shard_{i}_v2.jsonl.zip   documents: sentences and images that belong to them
    digits/images/*.png                       all images, 48 x 48 RGB
    digits/labels.csv                         image_name, split (pretrain, probe_train, test), label

The 1,797 scans of 8 x 8 pixels are split first; then each is drawn several times with another colour, place, size,
slant, background and noise, so that an untrained encoder cannot tell digits apart well. The text can: most images are
announced, in varied words, by the sentences before them. An encoder that learns to tell which image fits the text so
far has learned to read digits, without having seen a label.
The same arguments give the same files.

How much the text gives away is a choice. ``--announced 1`` is *redundant*: whatever is said after an image has been
said before it, and a language model need not look. ``--announced 0 --captioned 0 --followed-up 1`` is *descriptive*:
the digit is named once, behind the image, and only the image foretells it.
"""

from __future__ import annotations

import csv
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from sentences import ANNOUNCED, CAPTIONED, announcement, caption, closing, filler, follow_up, opening
from sklearn.datasets import load_digits

IMAGE_SIZE = 48
NUM_PRETRAIN, NUM_PROBE_TRAIN = 1100, 300
"""Scans of each split; the remaining 397 are the test split."""
IMAGES_PER_DOCUMENT = (0.45, 0.3, 0.15, 0.07, 0.02, 0.01)
"""Shares of documents with 1, 2, ... images. Many have one: where only one name has been read, a language model that
still averages over its context knows it, and the contrast has something to begin with."""


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """What is made, and where."""

    output: Path
    """Folder to write."""
    drawings_per_scan: int = 8
    """Drawings of each scan of the pretrain split; probe_train gets 4 and test 2."""
    documents_per_image: int = 2
    """How many documents each drawing appears in."""
    documents_per_shard: int = 500
    """Documents in one zip file."""
    junk_share: float = 0.05
    """Share of unrelated pictures with a low similarity, as in real data."""
    announced: float = ANNOUNCED
    """Share of images whose digit the sentence before them names."""
    captioned: float = CAPTIONED
    """Share of images whose digit the sentence names that they are matched to, which stands before or after them."""
    followed_up: float = CAPTIONED
    """Share of images whose digit the sentence after them names."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        for name in ("announced", "captioned", "followed_up"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value} is outside [0, 1]; it is a share of images")


def draw_digit(scan: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Draw one scan, (8, 8) with values 0..16, as an RGB image with all that does not matter chosen at random.

    Light ink on dark paper throughout: with ink of any colour on paper of any colour, a small encoder needs far
    more images than there are before it sees shapes at all.
    """
    size = int(rng.integers(38, IMAGE_SIZE - 1))
    ink = Image.fromarray((scan * (255 / 16)).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    page = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    left, top = (int(np.clip((IMAGE_SIZE - size) / 2 + shift, 0, IMAGE_SIZE - size)) for shift in rng.uniform(-3, 3, 2))
    page.paste(ink, (left, top))
    page = page.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BICUBIC)
    opacity = np.asarray(page, dtype=np.float64)[..., None] / 255
    return to_image(background(rng) * (1 - opacity) + rng.uniform(170, 255, 3) * opacity, rng)


def draw_junk(rng: np.random.Generator) -> Image.Image:
    """Draw a picture without a digit: a few coloured boxes."""
    picture = background(rng)
    for _ in range(rng.integers(2, 6)):
        top, left = rng.integers(0, IMAGE_SIZE - 8, size=2)
        height, width = rng.integers(4, 24, size=2)
        picture[top : top + height, left : left + width] = rng.uniform(0, 255, 3)
    return to_image(picture, rng)


def background(rng: np.random.Generator) -> np.ndarray:
    """Return a dark colour gradient in a random direction, (IMAGE_SIZE, IMAGE_SIZE, 3) float64, 0..255."""
    begin = rng.uniform(0, 75, 3)
    end = np.clip(begin + rng.uniform(-30, 30, 3), 0, 255)
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    ramp = np.clip(0.5 + np.cos(angle) * axis[:, None] + np.sin(angle) * axis[None, :], 0, 1)[..., None]
    paper: np.ndarray = begin * (1 - ramp) + end * ramp
    return paper


def to_image(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Add pixel noise and return the RGB image."""
    noisy = picture + rng.normal(0, rng.uniform(0, 10), picture.shape[:2])[..., None]
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def draw_splits(config: DigitsConfig, folder: Path) -> list[tuple[str, str, int]]:
    """Write all drawings of all scans; returns (image name, split, label) of each."""
    digits = load_digits()
    order = np.random.default_rng([config.seed, 0]).permutation(len(digits.target))
    rows = []
    for place, scan in enumerate(order):
        split, copies = "test", 2
        if place < NUM_PRETRAIN:
            split, copies = "pretrain", config.drawings_per_scan
        elif place < NUM_PRETRAIN + NUM_PROBE_TRAIN:
            split, copies = "probe_train", 4
        for copy in range(copies):
            name = f"{scan:04d}_{copy}.png"
            draw_digit(digits.images[scan], np.random.default_rng([config.seed, 1, scan, copy])).save(folder / name)
            rows.append((name, split, int(digits.target[scan])))
    return rows


def compose_document(
    images: list[tuple[str, int | None]], rng: np.random.Generator, config: DigitsConfig
) -> dict[str, object]:
    """Return an MMC4 record around images (name, digit; None for junk).

    Each image comes with three sentences: one that announces it, one that it is matched to (a training row shows
    the image before or after this one, at random), and one that refers back to it.
    """
    texts, infos = [opening(rng)], []
    for name, digit in images:
        if digit is None:
            similarity = rng.uniform(0.05, 0.23)
            texts += [filler(rng), filler(rng)]
        else:
            similarity = rng.uniform(0.25, 0.4)
            texts += [announcement(digit, rng, config.announced), caption(digit, rng, config.captioned)]
        infos.append(
            {
                "image_name": name,
                "raw_url": f"https://digits.invalid/{name}",
                "matched_text_index": len(texts) - 1,
                "matched_sim": round(float(similarity), 4),
            }
        )
        if digit is not None:
            texts.append(follow_up(digit, rng, config.followed_up))
        texts += [filler(rng) for _ in range(rng.integers(0, 2))]
    texts.append(closing(rng))
    return {"text_list": texts, "image_info": infos}


def compose_documents(config: DigitsConfig, rows: list[tuple[str, str, int]], folder: Path) -> list[dict[str, object]]:
    """Deal the pretrain drawings, and junk among them, to documents."""
    rng = np.random.default_rng([config.seed, 2])
    pool: list[tuple[str, int | None]] = [(name, label) for name, split, label in rows if split == "pretrain"]
    documents = []
    for round_ in range(config.documents_per_image):
        deck: list[tuple[str, int | None]] = list(pool)
        for number in range(round(len(pool) * config.junk_share)):
            name = f"junk_{round_}_{number:04d}.png"
            draw_junk(rng).save(folder / name)
            deck.append((name, None))
        deck = [deck[index] for index in rng.permutation(len(deck))]
        while deck:
            count = int(rng.choice(len(IMAGES_PER_DOCUMENT), p=IMAGES_PER_DOCUMENT)) + 1
            documents.append(compose_document(deck[:count], rng, config))
            deck = deck[count:]
    return documents


def write_shards(documents: list[dict[str, object]], folder: Path, documents_per_shard: int) -> int:
    """Write documents as zipped JSON lines, with fixed time stamps; returns the number of shards."""
    shards = range(0, len(documents), documents_per_shard)
    for number, begin in enumerate(shards):
        name = f"docs_shard_{number}_v2.jsonl"
        text = "".join(json.dumps(record) + "\n" for record in documents[begin : begin + documents_per_shard])
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(member, text, compress_type=zipfile.ZIP_DEFLATED)
    return len(shards)


def main() -> None:
    """Read the flags and write everything."""
    config = tyro.cli(DigitsConfig, description=__doc__)
    images, data = config.output / "images", config.output / "data"
    if config.output.exists() and any(config.output.iterdir()):
        raise SystemExit(f"error: {config.output} is not empty; remove it or choose another --output")
    images.mkdir(parents=True)
    data.mkdir()
    rows = draw_splits(config, images)
    with open(config.output / "labels.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image_name", "split", "label"])
        writer.writerows(rows)
    documents = compose_documents(config, rows, images)
    shards = write_shards(documents, data, config.documents_per_shard)
    print(f"{config.output}: {len(documents):,} documents in {shards} shards, {len(rows):,} labelled images")


if __name__ == "__main__":
    main()
