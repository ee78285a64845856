"""How full rows are, how many images they hold, and how fast they are planned.

python benchmarks/packing.py --data-path corpus

The last line is one JSON object: ``fill`` is the share of positions that hold a document, ``fill_one_per_row`` what it
would be with one document per row, ``fill_window`` that of layout ``window``, ``documents_per_s`` the speed at which an
epoch's rows are looked up and composed, on one core, and ``table_s`` what the table of all rows takes before (once for
all epochs); processor time.
"""

from __future__ import annotations

import argparse
import json
import time

from lcl_megatron.config import DataConfig
from lcl_megatron.data.planning.rows import SourceRows
from lcl_megatron.data.storage.corpus import Corpus


def measure(corpus: Corpus, config: DataConfig, num_latents: int, seconds: float) -> dict[str, float]:
    """Plan whole epochs until so many seconds of processor time have passed."""
    begin = time.process_time()
    source = SourceRows(corpus, "interleaved", config, num_latents, seed=0)
    table_s = time.process_time() - begin
    source.statistics(0)  # reads the side arrays from the disk
    begin = time.process_time()
    documents = epoch = 0
    while epoch == 0 or time.process_time() - begin < seconds:
        statistics = source.statistics(epoch)
        documents += statistics.documents
        epoch += 1
    elapsed = time.process_time() - begin
    return {
        "fill": statistics.tokens / (statistics.rows * config.seq_length),
        "images_per_row": statistics.images / statistics.rows,
        "documents_per_s": documents / elapsed,
        "table_s": table_s,
        "documents": statistics.documents,
        "rows": statistics.rows,
    }


def main() -> None:
    """Read the flags, measure every layout, print lines and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, help="folder of a preprocessed corpus")
    parser.add_argument("--num-latents", type=int, default=196, help="latents per image")
    parser.add_argument("--seq-length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--max-images-per-row", type=int, default=0, help="image budget of a row; 0 = no limit")
    parser.add_argument("--min-seconds", type=float, default=2.0, help="shortest time of each measurement")
    flags = parser.parse_args()
    corpus = Corpus.open(flags.data_path)
    print(f"{flags.data_path}: {corpus.num_documents:,} documents, {corpus.num_images:,} images")
    results = {}
    for layout in ("packed", "pad", "window"):
        config = DataConfig(
            seq_length=flags.seq_length,
            layout=layout,
            max_images_per_row=flags.max_images_per_row if layout == "packed" else 0,
        )
        result = results[layout] = measure(corpus, config, flags.num_latents, flags.min_seconds)
        print(
            f"{layout:6}: {result['fill']:.2%} full, {result['images_per_row']:.2f} images per row, "
            f"{result['documents_per_s']:,.0f} documents/s"
        )
    extra = {"fill_one_per_row": results["pad"]["fill"], "fill_window": results["window"]["fill"]}
    print(json.dumps(results["packed"] | extra | {"seq_length": flags.seq_length}))


if __name__ == "__main__":
    main()
