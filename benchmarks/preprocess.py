"""How fast shards and images become a corpus, on one core and on two.

python benchmarks/preprocess.py
python benchmarks/preprocess.py --input data/*.zip --image-root images --tokenizer-model tokenizer.model

Without ``--input`` it makes documents like those of the web (see ``synthetic.py``). It preprocesses them with one and
with two processes in turn, several times, and prints the median. The last line is one JSON object:

``documents_per_s_core``, ``images_per_s_core``, ``mb_per_s_core``
    per second of processor time of a run with one process: all of it, from reading the shards to the manifest, but
    the start of Python. Bytes are those of shards and images.
``documents_per_s_1``, ``documents_per_s_2``, ``scaling_2``
    per second of the clock with one and two processes, and their ratio: from the moment when as many shards are
    finished as there are processes to the end of the last shard, without start-up and commit.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from synthetic import SyntheticCorpus

from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from lcl_megatron.data.preprocessing.progress import Counters, Progress
from lcl_megatron.data.preprocessing.tokenizer_texts import training_texts
from lcl_megatron.data.tokenizer import train_tokenizer


class Clock(Progress):
    """Notes when each shard was finished, and with how many documents."""

    def __init__(self) -> None:
        super().__init__()
        self.finished: list[tuple[float, int]] = []

    def shard_finished(self, part: Path, counters: Counters) -> None:
        """Note time and documents."""
        super().shard_finished(part, counters)
        self.finished.append((time.perf_counter(), counters.documents))

    def documents_per_s(self, num_workers: int) -> float:
        """Return the speed from the moment when every process had finished a shard to the end of the last one."""
        first, last = self.finished[num_workers - 1][0], self.finished[-1][0]
        return sum(documents for _, documents in self.finished[num_workers:]) / (last - first)


@dataclass(frozen=True)
class Run:
    """One run of preprocessing, measured."""

    documents: int
    """Documents kept."""
    images: int
    """Images kept."""
    bytes: int
    """Bytes of shards and images that were read."""
    cpu_seconds: float
    """Processor time of this process and its workers."""
    documents_per_s: float
    """Per second of the clock, in the steady state."""


def measure(config: PreprocessConfig) -> Run:
    """Preprocess into an empty place, and clean up."""
    clock, begin = Clock(), cpu_seconds()
    summary = preprocess(config, clock)
    used = cpu_seconds() - begin
    shutil.rmtree(config.output)
    totals = summary.totals
    read = totals.source_image_bytes + sum(path.stat().st_size for path in config.input)
    return Run(totals.documents, totals.images, read, used, clock.documents_per_s(config.num_workers))


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def synthetic_config(folder: Path, flags: argparse.Namespace) -> PreprocessConfig:
    """Make shards, images and a tokenizer below ``folder``."""
    SyntheticCorpus(flags.shards * flags.documents, flags.image_side).write(folder)
    whole = folder / "docs_shard_0_v2.jsonl"
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    shards = [folder / f"part_{number:03d}.jsonl" for number in range(flags.shards)]
    for number, shard in enumerate(shards):
        shard.write_text("".join(lines[number :: flags.shards]), encoding="utf-8")
    return PreprocessConfig(
        input=tuple(shards),
        image_root=folder / "images",
        tokenizer_model=folder / "tokenizer.model",
        output=folder / "measured",
    )


def given_config(folder: Path, flags: argparse.Namespace) -> PreprocessConfig:
    """Return a run over the shards that were named; without a tokenizer, one is trained on them."""
    model = flags.tokenizer_model or folder / "tokenizer.model"
    if flags.tokenizer_model is None:
        train_tokenizer(training_texts(flags.input, 50_000, flags.format), model, 16_000)
    return PreprocessConfig(
        input=tuple(flags.input),
        format=flags.format,
        image_root=flags.image_root,
        tokenizer_model=model,
        output=folder / "measured",
    )


def parse_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", help="shards; at least 8, of about equal size")
    parser.add_argument("--format", default="mmc4", help="format of the shards")
    parser.add_argument("--image-root", type=Path, help="folder of the images")
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer; without it, one is trained")
    parser.add_argument("--shards", type=int, default=20, help="shards that are made where none is given")
    parser.add_argument("--documents", type=int, default=200, help="documents of each of them")
    parser.add_argument("--image-side", type=int, default=320, help="width of their pictures")
    parser.add_argument("--check-images", choices=("header", "decode"), default="header", help="as preprocess_data.py")
    parser.add_argument("--resize-short-side", type=int, default=0, help="as preprocess_data.py")
    parser.add_argument("--repeats", type=int, default=5, help="runs with one and two processes each")
    return parser.parse_args()


def main() -> None:
    """Measure one and two processes in turn, print every pair and the medians."""
    flags = parse_flags()
    with tempfile.TemporaryDirectory() as name:
        config = given_config(Path(name), flags) if flags.input else synthetic_config(Path(name), flags)
        config = replace(config, check_images=flags.check_images, resize_short_side=flags.resize_short_side)
        pairs = []
        for _ in range(flags.repeats):
            one, two = (measure(replace(config, num_workers=workers)) for workers in (1, 2))
            pairs.append((one, two))
            print(
                f"{one.documents:,} documents, {one.images:,} images, {one.bytes / 1e6:,.0f} MB in "
                f"{one.cpu_seconds:.1f} s of processor time; {one.documents_per_s:,.0f} documents/s with one process, "
                f"{two.documents_per_s:,.0f} with two",
                flush=True,
            )
    median = statistics.median
    result = {
        "documents_per_s_core": median(one.documents / one.cpu_seconds for one, _ in pairs),
        "images_per_s_core": median(one.images / one.cpu_seconds for one, _ in pairs),
        "mb_per_s_core": median(one.bytes / 1e6 / one.cpu_seconds for one, _ in pairs),
        "documents_per_s_1": median(one.documents_per_s for one, _ in pairs),
        "documents_per_s_2": median(two.documents_per_s for _, two in pairs),
        "scaling_2": median(two.documents_per_s / one.documents_per_s for one, two in pairs),
        "documents": pairs[0][0].documents,
        "images": pairs[0][0].images,
    }
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))


if __name__ == "__main__":
    main()
