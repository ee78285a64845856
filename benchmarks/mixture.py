"""How exactly several corpora are mixed: shares over every stretch of 1,000 rows.

python benchmarks/mixture.py --data-path laion mmc4 --weights 1 1 --by images

The last line is one JSON object: ``max_share_error`` is the largest difference, over all stretches and corpora, between
the share that a corpus has and the one that was asked for (0.01 = one percent of the whole).
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from lcl_megatron.config import DataConfig
from lcl_megatron.data.planning.mixture import RowSequence
from lcl_megatron.data.storage.corpus import Corpus

STRETCH = 1000


def largest_error(sequence: RowSequence, weights: np.ndarray, rows: int) -> float:
    """Return the largest error of a share over all stretches of the first rows."""
    block = sequence.read(0, rows)
    source = np.array([row.source for row in block.rows])
    by_images = sequence.config.mixture_by == "images"
    amount = block.counts.num_images if by_images else block.counts.num_tokens
    ends = np.cumsum(np.where(source == np.arange(len(weights))[:, None], amount, 0), axis=1)
    ends = np.concatenate([np.zeros((len(weights), 1), dtype=ends.dtype), ends], axis=1)
    stretches = ends[:, STRETCH:] - ends[:, :-STRETCH]
    return float(np.abs(stretches / stretches.sum(axis=0) - (weights / weights.sum())[:, None]).max())


def main() -> None:
    """Read the flags, measure, print lines and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True, nargs="+", help="folders of preprocessed corpora")
    parser.add_argument("--weights", type=float, nargs="+", required=True, help="share of each corpus, in any unit")
    parser.add_argument("--by", choices=["images", "tokens"], default="images", help="what the shares are shares of")
    parser.add_argument("--view", nargs="+", default=["interleaved"], help="view of each corpus, or of all")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to look at")
    parser.add_argument("--num-latents", type=int, default=196, help="latents per image")
    flags = parser.parse_args()
    config = DataConfig(
        data_path=tuple(flags.data_path),
        mixture_weights=tuple(flags.weights),
        mixture_by=flags.by,
        view=tuple(flags.view),
    )
    sequence = RowSequence([Corpus.open(path) for path in flags.data_path], config, flags.num_latents, seed=0)
    for source, share in zip(sequence.sources, sequence.row_shares, strict=True):
        images, tokens = source.means
        print(f"{source.corpus.path}: {share:.1%} of rows, {images:.2f} images and {tokens:.0f} tokens each")
    error = largest_error(sequence, np.array(flags.weights), flags.rows)
    print(json.dumps({"max_share_error": error, "stretch": STRETCH, "rows": flags.rows, "by": flags.by}))


if __name__ == "__main__":
    main()
