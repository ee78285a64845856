"""Thousands of damaged images, read through the loader of a real run.

python benchmarks/fuzz_images.py --images 10000

Two corpora are written that differ only in that the second has an intact image wherever the first has a damaged one
(``damaged.py`` lists the kinds). Each is read to its end by a process of its own. Prints what became of every kind,
and one JSON object as the last line: ``crashes`` and ``hangs`` of the reading process, ``max_s`` the longest time that
one damaged image takes a processor, ``rss_above_idle_mb`` the largest memory of the reading process above what it had
with corpus and loader open, ``others_unchanged`` whether all other samples are the same, bit by bit and in the same
order, in both corpora, ``counted`` whether exactly the images that cannot be decoded are reported, each by its source.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from damaged import KINDS, NUM_INTACT, intact

from lcl_megatron.config import DataConfig
from lcl_megatron.data.decoding.image_decoder import SingleImageDecoder
from lcl_megatron.data.decoding.images import TrainingTransform, empty_images
from lcl_megatron.data.document import ImageKind, ImageSegment, Source
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument, StoredImage
from lcl_megatron.data.storage.corpus_writer import write_corpus
from lcl_megatron.data.tokenizer import train_tokenizer

IMAGES_PER_DOCUMENT = 4
"""Of which every second one is damaged."""
SIZE = 224
NUM_LATENTS = 8
ROWS = 2
"""Rows of a step: few, so that finished pixels are a small part of the memory."""
IMAGE_BITS = 40
"""Bits of an image key that hold the image's index, counted from 1."""
SECONDS_PER_IMAGE = 10.0
"""An image that takes longer counts as one that hangs."""
MAIN = "damaged"
OTHER = "intact"


@dataclass(frozen=True)
class Fuzz:
    """What is made and how it is read."""

    num_damaged: int
    """Damaged images."""
    seed: int = 0
    """Decides the damage."""
    num_workers: int = 4
    """Threads that decode."""
    backend: str = "cpu"
    """``data.image_backend``."""

    def kinds(self) -> list[str]:
        """Return the kind of every damaged image."""
        weights = np.array([kind.weight for kind in KINDS.values()])
        rng = np.random.default_rng([self.seed, 1])
        return [str(name) for name in rng.choice(list(KINDS), self.num_damaged, p=weights / weights.sum())]

    def write(self, folder: Path) -> None:
        """Write both corpora."""
        tokenizer = train_tokenizer(["a small text about nothing at all", "and more"], folder / "tokenizer.model", 290)
        for name in (MAIN, OTHER):
            write_corpus(folder / name, self._documents(name == MAIN), tokenizer)

    def _documents(self, with_damage: bool) -> Iterator[EncodedDocument]:
        kinds = self.kinds()
        per_document = IMAGES_PER_DOCUMENT // 2
        for number, begin in enumerate(range(0, self.num_damaged, per_document)):
            images = []
            for index in range(begin, min(begin + per_document, self.num_damaged)):
                images.append(intact(index % NUM_INTACT))
                rng = np.random.default_rng([self.seed, 2, index])
                images.append(KINDS[kinds[index]].make(rng) if with_damage else intact((index + 7) % NUM_INTACT))
            stored = [
                StoredImage(ImageSegment(f"{i}.img", i, i, 0.5, ImageKind.MATCHED), data, 40, 30)
                for i, data in enumerate(images)
            ]
            segments = [[10 + i, 11 + number % 200] for i in range(len(stored))]
            yield EncodedDocument(segments, stored, Source("fuzz.jsonl", number + 1))

    def read(self, corpus_path: Path, output: Path) -> None:
        """Read one epoch and write what came: runs in a process of its own."""
        corpus = Corpus.open(corpus_path)
        config = DataConfig(
            seq_length=256,
            max_images_per_document=IMAGES_PER_DOCUMENT,
            num_workers=self.num_workers,
            image_backend=self.backend,
        )
        loader = StepLoader(Plan([corpus], config, NUM_LATENTS, ROWS, ROWS, 1, seed=self.seed), 0, SIZE)
        idle = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        keys, digests, ok, bad = [], [], [], []
        begin = time.perf_counter()
        for step in loader:
            (batch,) = step.micro_batches
            keys.extend(batch.image_keys.tolist())
            ok.extend(batch.image_ok.tolist())
            digests.extend(zlib.crc32(np.ascontiguousarray(image)) for image in batch.images.numpy())
            bad.extend(step.bad_images)
            if min(keys[-len(batch.image_keys) :]) >> IMAGE_BITS:
                break
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        report = {
            "keys": keys,
            "digests": digests,
            "ok": ok,
            "bad": bad,
            "rss_above_idle_mb": (peak - idle) / 1e6,
            "images_per_s": len(keys) / seconds,
            "seconds": [],
        }
        if corpus_path.name == MAIN:
            report["seconds"] = _time_each(corpus, TrainingTransform(SIZE, self.seed))
        output.write_text(json.dumps(report))

    def check(self, corpus: Corpus, main: dict[str, list], other: dict[str, list]) -> dict[str, object]:
        """Compare what the two processes read; prints what became of every kind."""
        kinds = self.kinds()
        fates: Counter[tuple[str, bool]] = Counter()
        expected = main["keys"] == other["keys"] and all(other["ok"])
        wrong, named = [], []
        seen = set()
        for place, key in enumerate(main["keys"]):
            image = (key & ((1 << IMAGE_BITS) - 1)) - 1
            seen.add(image)
            ok = main["ok"][place]
            if not ok:
                named.append(corpus.image_source(image))
            if image % 2 == 0:
                expected &= ok and main["digests"][place] == other["digests"][place]
                continue
            fates[kinds[image // 2], ok] += 1
            if KINDS[kinds[image // 2]].decodes not in (None, ok):
                wrong.append(f"{corpus.image_source(image)}: {kinds[image // 2]}, decoded: {ok}")
        for kind in KINDS:
            print(f"{kind:14} {fates[kind, True]:6,} decoded {fates[kind, False]:6,} reported")
        for line in wrong[:20]:
            print(f"unexpected: {line}")
        reported = [line.split("): ", 1)[0] + ")" for line in main["bad"]]
        return {
            "others_unchanged": bool(expected and seen == set(range(corpus.num_images))),
            "counted": reported == named and not wrong,
        }


def _time_each(corpus: Corpus, transform: TrainingTransform) -> list[float]:
    """Return the processor time of every damaged image, decoded once more."""
    decode, (pixels,) = SingleImageDecoder(transform), empty_images(1, SIZE)
    seconds = []
    for image in range(1, corpus.num_images, 2):
        begin = time.thread_time()
        decode(pixels, corpus.image_bytes(image), image)
        seconds.append(time.thread_time() - begin)
    return seconds


def run(fuzz: Fuzz, folder: Path) -> dict[str, object]:
    """Write both corpora, read both, compare."""
    fuzz.write(folder)
    crashes = hangs = 0
    for name in (MAIN, OTHER):
        flags = [f"--images={fuzz.num_damaged}", f"--seed={fuzz.seed}", f"--num-workers={fuzz.num_workers}"]
        command = [sys.executable, __file__, *flags, f"--image-backend={fuzz.backend}", "--read", str(folder / name)]
        root = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        try:
            limit = 120 + 0.5 * fuzz.num_damaged
            done = subprocess.run(command, timeout=limit, env=os.environ | {"PYTHONPATH": path}, check=False)
            crashes += done.returncode != 0
        except subprocess.TimeoutExpired:
            hangs += 1
    result: dict[str, object] = {"images": fuzz.num_damaged, "crashes": crashes, "hangs": hangs}
    if crashes or hangs:
        return result
    main, other = (json.loads((folder / f"{name}.json").read_text()) for name in (MAIN, OTHER))
    print(f"{main['images_per_s']:,.0f} images/s with the damaged ones, {other['images_per_s']:,.0f} without")
    return result | {
        "hangs": sum(seconds > SECONDS_PER_IMAGE for seconds in main["seconds"]),
        "max_s": max(main["seconds"]),
        "rss_above_idle_mb": main["rss_above_idle_mb"],
        **fuzz.check(Corpus.open(folder / MAIN), main, other),
    }


def main() -> None:
    """Read the flags and run; with --read, be one of the reading processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000, help="damaged images")
    parser.add_argument("--seed", type=int, default=0, help="decides the damage")
    parser.add_argument("--num-workers", type=int, default=4, help="threads that decode")
    parser.add_argument("--image-backend", default="cpu", help="cpu or dali_cpu")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    fuzz = Fuzz(flags.images, flags.seed, flags.num_workers, flags.image_backend)
    if flags.read:
        fuzz.read(flags.read, flags.read.with_suffix(".json"))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(fuzz, Path(folder))))


if __name__ == "__main__":
    main()
