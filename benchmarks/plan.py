"""How long a run waits for its plan, how much memory that takes, and how fast any row of it is found.

python benchmarks/plan.py --documents 100000000 --folder scratch

Makes the index of a corpus of so many documents (real index files, without texts and images; about 8 GB on disk per
100 million) and plans rows of 2,048 tokens from it, in processes of their own. The last line is one JSON object:
``startup_s`` and ``startup_gib`` are the time to open the corpus and build the plan for the first time, and the peak
resident memory of the process; ``cached_s`` the time of the next one; ``row_ms`` the median over rows at random
positions of a hundred epochs, ``step_ms`` that of all 2,048 rows of a step and who gets them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lcl_megatron.config import DataConfig
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.storage.corpus import FORMAT, FORMAT_VERSION, IMAGE_ARRAYS, Corpus, fingerprint
from lcl_megatron.data.storage.indexed_file import DTYPE_CODES, HEADER, MAGIC
from lcl_megatron.data.tokenizer import Tokenizer, train_tokenizer

CHUNK = 1 << 20
ROWS = 2048
RANKS = 64


class IndexMaker:
    """Writes the index of a corpus: 1 to 5 segments and 1 to 6 images a document, lengths log-normal."""

    def __init__(self, folder: Path, documents: int) -> None:
        self.folder, self.documents = folder, documents
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        self.segments = rng.integers(1, 6, documents, dtype=np.int8)
        self.images = rng.choice(np.arange(1, 7, dtype=np.int8), documents, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
        self.num_segments = int(self.segments.sum(dtype=np.int64))
        self.num_images = int(self.images.sum(dtype=np.int64))
        self.tokens = 0

    def write(self) -> None:
        """Write all files."""
        self._index("tokens", "uint16", self.num_segments, self.segments)
        for name in ("images", "names"):
            self._index(name, "uint8", self.num_images, self.images)
            (self.folder / f"{name}.bin").touch()
        self._segments()
        self._image_arrays()
        tokenizer = train_tokenizer(["a small text about nothing at all"], self.folder / "tokenizer.model", 290)
        self._manifest(tokenizer)

    def _index(self, name: str, dtype: str, sequences: int, per_document: np.ndarray) -> None:
        """Write header and borders of an index; lengths and places stay 0, as holes in the file."""
        with open(self.folder / f"{name}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], sequences, self.documents + 1))
            stream.seek(12 * sequences, 1)
            stream.write(np.zeros(1, dtype=np.int64).tobytes())
            total = 0
            for begin in range(0, self.documents, CHUNK):
                borders = total + np.cumsum(per_document[begin : begin + CHUNK], dtype=np.int64)
                stream.write(borders.tobytes())
                total = int(borders[-1])

    def _segments(self) -> None:
        rng = np.random.default_rng(1)
        shape = (self.num_segments,)
        path = self.folder / "tokens.idx"
        lengths = np.memmap(path, "<i4", "r+", HEADER.size, shape)
        places = np.memmap(path, "<i8", "r+", HEADER.size + 4 * self.num_segments, shape)
        for begin in range(0, self.num_segments, CHUNK):
            end = min(self.num_segments, begin + CHUNK)
            lengths[begin:end] = rng.lognormal(4.6, 0.8, end - begin).clip(1, 3000)
            places[begin:end] = 2 * (self.tokens + np.cumsum(lengths[begin:end], dtype=np.int64) - lengths[begin:end])
            self.tokens += int(lengths[begin:end].sum(dtype=np.int64))
        with open(self.folder / "tokens.bin", "wb") as stream:
            stream.truncate(2 * self.tokens)

    def _image_arrays(self) -> None:
        rng = np.random.default_rng(2)
        arrays = {
            name: np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", np.dtype(dtype), (self.num_images,))
            for name, dtype in IMAGE_ARRAYS.items()
        }
        written = 0
        for begin in range(0, self.documents, CHUNK):
            counts = self.images[begin : begin + CHUNK].astype(np.int64)
            owner = np.repeat(np.arange(len(counts)), counts)
            place = (rng.random(len(owner)) * self.segments[begin : begin + CHUNK][owner]).astype(np.int64)
            order = np.argsort(owner * 8 + place, kind="stable")
            part = slice(written, written + len(owner))
            arrays["image_segment"][part] = place[order]
            arrays["image_similarity"][part] = 0.2 + 0.2 * rng.random(len(owner), dtype=np.float32)
            written += len(owner)
        np.lib.format.open_memmap(self.folder / "document_source.npy", "w+", np.dtype(np.int64), (self.documents, 2))

    def _manifest(self, tokenizer: Tokenizer) -> None:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": "0" * 64} for path in sorted(self.folder.iterdir())
        }
        counts = {
            "documents": self.documents,
            "segments": self.num_segments,
            "images": self.num_images,
            "tokens": self.tokens,
            "image_bytes": 0,
        }
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint(files),
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "token_range": [0, 0],
            },
            "counts": counts,
            "sources": [{"name": "none", "input": 0}],
            "files": files,
        }
        (self.folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def plan_once(folder: Path) -> dict[str, float]:
    """Build or load the plan in this process, then ask for rows; runs in a process of its own."""
    begin = time.perf_counter()
    config = DataConfig(data_path=(str(folder),))
    plan = Plan([Corpus.open(folder)], config, 196, ROWS, ROWS // RANKS, RANKS, seed=0)
    startup = time.perf_counter() - begin
    # Not ru_maxrss, which a process inherits from its parent.
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20  # type: ignore[index]
    rows_per_epoch = plan.sequence.sources[0].num_rows
    rng = np.random.default_rng(0)
    row_ms = [_milliseconds(plan.sequence.read, int(row), 1) for row in rng.integers(0, 100 * rows_per_epoch, 200)]
    step_ms = [_milliseconds(plan.step, int(step)) for step in rng.integers(0, 100 * rows_per_epoch // ROWS, 20)]
    images, tokens = plan.sequence.sources[0].means
    return {
        "startup_s": startup,
        "startup_gib": peak,
        "rows_per_epoch": rows_per_epoch,
        "row_ms": float(np.median(row_ms)),
        "row_ms_max": max(row_ms),
        "step_ms": float(np.median(step_ms)),
        "fill": tokens / config.seq_length,
        "images_per_row": images,
    }


def _milliseconds(function: object, *arguments: int) -> float:
    begin = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    """Read the flags, make the index unless it is there, measure twice, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--folder", type=Path, help="where the index is made and kept; default: a temporary folder")
    parser.add_argument("--only-plan", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.only_plan:
        print(json.dumps(plan_once(flags.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (flags.folder or Path(temporary)) / f"index-{flags.documents}"
        if not folder.exists():
            print(f"making the index of {flags.documents:,} documents in {folder}", flush=True)
            IndexMaker(folder, flags.documents).write()
        shutil.rmtree(folder.with_name(f"{folder.name}.cache"), ignore_errors=True)
        runs = []
        for name in ("first", "cached"):
            command = [sys.executable, __file__, "--only-plan", "--folder", str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
            print(f"{name:6}: {runs[-1]['startup_s']:.2f} s, {runs[-1]['startup_gib']:.2f} GiB", flush=True)
    first, cached = runs
    result = {**cached, **{name: first[name] for name in ("startup_s", "startup_gib")}}
    print(json.dumps({**result, "cached_s": cached["startup_s"], "documents": flags.documents}))


if __name__ == "__main__":
    main()
