r"""Join corpora of the same tokenizer into one (docs/data.md).

python tools/merge_corpora.py --input corpus_a corpus_b --output corpus

Interrupted? Run the same command again: corpora that are done are not copied again.
"""

from __future__ import annotations

import sys

import tyro

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.preprocessing.merge import MergeConfig, merge_corpora
from lcl_megatron.data.storage.indexed_file import CorpusError


def main() -> None:
    """Read the flags, write the corpus, print progress to stderr and what was written to stdout."""
    try:
        config = tyro.cli(MergeConfig, description=__doc__)
        corpus = merge_corpora(config, lambda line: print(line, file=sys.stderr, flush=True))
    except (ConfigError, CorpusError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"corpus {corpus.path} (fingerprint {corpus.fingerprint[:16]})")
    for name, number in corpus.manifest["counts"].items():
        print(f"  {name:18} {number:,}")


if __name__ == "__main__":
    main()
