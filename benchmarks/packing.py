"""How full rows are, how many images they hold, and how fast they are planned.

python benchmarks/packing.py --data-path corpus --window 1024 4096

Prints one line per window size, and for the last of them one JSON object as the last line: ``fill`` is the share of
positions that hold a document, ``fill_one_per_row`` what it would be with one document per row, ``documents_per_s``
the speed of composing and packing together, on one core, ``packed_documents_per_s`` that of packing alone.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from lcl_megatron.config import DataConfig
from lcl_megatron.data.corpus import Corpus
from lcl_megatron.data.packing import pack_documents
from lcl_megatron.data.rows import RowSequence


def measure(corpus: Corpus, config: DataConfig, num_latents: int, seconds: float) -> dict[str, float]:
    """Pack at least one epoch, and go on until so many seconds of processor time have passed."""
    begin = time.process_time()
    documents = rows = tokens = images = epoch = 0
    while epoch == 0 or time.process_time() - begin < seconds:
        # A new sequence per epoch: a cached window would be counted as planned in no time.
        statistics = RowSequence(corpus, config, num_latents, seed=0).statistics(epoch)
        documents += statistics.documents
        rows += statistics.rows
        tokens += statistics.tokens
        images += statistics.images
        epoch += 1
    elapsed = time.process_time() - begin
    return {
        "fill": tokens / (rows * config.seq_length),
        "fill_one_per_row": tokens / (documents * config.seq_length),
        "images_per_row": images / rows,
        "documents_per_s": documents / elapsed,
        "packed_documents_per_s": packing_speed(corpus, config, num_latents, seconds),
        "window": config.packing_window,
        "documents": statistics.documents,
        "rows": statistics.rows,
    }


def packing_speed(corpus: Corpus, config: DataConfig, num_latents: int, seconds: float) -> float:
    """Return documents per second of processor time of packing one window of known lengths."""
    sequence = RowSequence(corpus, config, num_latents, seed=0)
    documents = sequence.documents[np.arange(min(len(sequence.documents), config.packing_window))]
    composed = sequence.composer.compose(documents, 0)
    used = composed.num_images > 0
    lengths, images = composed.lengths[used], composed.num_images[used]
    begin, count = time.process_time(), 0
    while count == 0 or time.process_time() - begin < seconds:
        pack_documents(lengths, config.seq_length, images, config.max_images_per_row)
        count += len(lengths)
    return count / (time.process_time() - begin)


def main() -> None:
    """Read the flags, measure every window size, print lines and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, help="folder of a preprocessed corpus")
    parser.add_argument("--window", type=int, nargs="+", default=[2048], help="documents among which packing chooses")
    parser.add_argument("--num-latents", type=int, default=196, help="latents per image")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--max-images-per-row", type=int, default=0, help="image budget of a row; 0 = no limit")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="shortest time of each measurement")
    flags = parser.parse_args()
    corpus = Corpus.open(flags.data_path)
    print(f"{flags.data_path}: {corpus.num_documents:,} documents, {corpus.num_images:,} images")
    for window in flags.window:
        config = DataConfig(
            seq_length=flags.seq_length, packing_window=window, max_images_per_row=flags.max_images_per_row
        )
        result = measure(corpus, config, flags.num_latents, flags.min_seconds)
        print(
            f"window {window:6,}: {result['fill']:.2%} full ({result['fill_one_per_row']:.2%} with one document per "
            f"row), {result['images_per_row']:.2f} images per row, {result['documents_per_s']:,.0f} documents/s "
            f"({result['packed_documents_per_s']:,.0f} packing alone)"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
