"""The labelled images and the documents about them, and the corpora that are made of them once.

A data folder holds ``labels.csv`` (image_name, split, label), ``images/`` or ``images.tar.xz``, and documents in MMC4
layout below a folder named after their style: ``docs_10k/redundant/data/*.zip`` is found as ``redundant`` and as
``docs_10k/redundant``. Or each style is a folder of its own with all three, as ``examples/digits/make_corpus.py``
writes it: ``redundant/{data,images,labels.csv}``.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from lcl_megatron.config import ConfigError
from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from lcl_megatron.data.preprocessing.tokenizer_texts import training_texts
from lcl_megatron.data.tokenizer import train_tokenizer

DIGITS = "digits"
"""What ``--data`` says for the set that is made on the spot."""
DIGIT_STYLES = {
    "redundant": ("--announced", "1"),
    "descriptive": ("--announced", "0", "--captioned", "0", "--followed-up", "1"),
}
"""Flags of ``examples/digits/make_corpus.py`` for the styles of documents."""
MAKE_DIGITS = Path(__file__).parents[2] / "digits" / "make_corpus.py"
PRETRAIN, PROBE_TRAIN = "pretrain", "probe_train"


@dataclass(frozen=True)
class StyledDocuments:
    """Documents of one style over labelled images."""

    style: str
    """Name of the style."""
    shards: tuple[Path, ...]
    """MMC4 shards."""
    images: Path
    """Folder of the images."""
    labels: Path
    """``labels.csv``."""


@dataclass(frozen=True)
class ExperimentData:
    """What the runs read."""

    name: str
    """Name of the data set."""
    main: StyledDocuments
    """Documents of the main table."""
    control: StyledDocuments
    """Documents that cannot be foretold without looking."""
    test_split: str
    """Split that is scored: the one that is neither ``pretrain`` nor ``probe_train``."""
    corpora: dict[str, Path]
    """Corpus of each style."""


def open_data(data: str, output: Path, styles: tuple[str, str], vocab_size: int) -> ExperimentData:
    """Find or make the data, and make the corpora below ``output``; what is there already is kept.

    Args:
        data: the folder, or ``digits``.
        output: folder of the experiment.
        styles: documents of the main table and of the control.
        vocab_size: token ids of the tokenizer.

    Raises:
        ConfigError: a part of the data is missing; the message says where it was looked for.
    """
    root = _make_digits(output / "data", styles) if data == DIGITS else Path(data)
    main, control = (_find_style(root, style, output / "data") for style in styles)
    corpora = _make_corpora((main, control), output / "data", vocab_size)
    name = DIGITS if data == DIGITS else root.resolve().name
    return ExperimentData(name, main, control, _test_split(main.labels), corpora)


def _make_digits(folder: Path, styles: tuple[str, str]) -> Path:
    """Write the digits with documents of each style, and return the folder that holds both."""
    for style in dict.fromkeys(styles):
        if style not in DIGIT_STYLES:
            raise ConfigError(f"documents = {style!r}: digits come in the styles {', '.join(DIGIT_STYLES)}")
        target = folder / DIGITS / style
        if not target.exists():
            staged = target.with_name(f"{style}.tmp")
            staged.mkdir(parents=True)
            subprocess.run([sys.executable, MAKE_DIGITS, "--output", staged, *DIGIT_STYLES[style]], check=True)
            staged.rename(target)
    return folder / DIGITS


def _find_style(root: Path, style: str, folder: Path) -> StyledDocuments:
    places = [root / style, *sorted(root.glob(f"*/{style}"))]
    place = next((place for place in places if any((place / "data").glob("*.zip"))), None)
    if place is None:
        raise ConfigError(
            f"{root} has no documents of style {style!r}: looked for {root / style / 'data'}/*.zip and "
            f"{root / '*' / style / 'data'}/*.zip. Give another --data, or a preset with other documents"
        )
    shards = sorted((place / "data").glob("*.zip"), key=lambda path: (len(path.name), path.name))
    owner = place if (place / "labels.csv").is_file() else root
    if not (owner / "labels.csv").is_file():
        raise ConfigError(f"there is no labels.csv in {place} or {root}; expected image_name, split, label")
    return StyledDocuments(style, tuple(shards), _images(owner, folder), owner / "labels.csv")


def _images(owner: Path, folder: Path) -> Path:
    """Return the image folder, unpacked below ``folder`` if it is packed."""
    packed = owner / "images.tar.xz"
    if (owner / "images").is_dir():
        return owner / "images"
    if not packed.is_file():
        raise ConfigError(f"{owner} has neither images/ nor images.tar.xz")
    if not (folder / "images").is_dir():
        with tarfile.open(packed) as archive:
            archive.extractall(folder / "images.tmp", filter="data")
        (folder / "images.tmp" / "images").rename(folder / "images")
    return folder / "images"


def _test_split(labels: Path) -> str:
    with open(labels, encoding="utf-8", newline="") as stream:
        splits = sorted({row["split"] for row in csv.DictReader(stream)})
    others = [split for split in splits if split not in (PRETRAIN, PROBE_TRAIN)]
    if len(others) != 1 or len(splits) != 3:
        raise ConfigError(
            f"{labels}: splits {splits}; expected {PRETRAIN}, {PROBE_TRAIN} and one more, which is scored"
        )
    return others[0]


def _make_corpora(documents: tuple[StyledDocuments, ...], folder: Path, vocab_size: int) -> dict[str, Path]:
    """Train one tokenizer on all documents and preprocess each style; returns the corpus of each."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.exists():
        shards = [shard for style in documents for shard in style.shards]
        staged = tokenizer.with_name("tokenizer.tmp")
        train_tokenizer(training_texts(shards, 500_000), staged, vocab_size)
        staged.rename(tokenizer)
    corpora = {}
    for style in documents:
        corpora[style.style] = corpus = folder / f"corpus-{style.style.replace('/', '-')}"
        if not corpus.exists():
            preprocess(
                PreprocessConfig(input=style.shards, image_root=style.images, tokenizer_model=tokenizer, output=corpus)
            )
    return corpora
