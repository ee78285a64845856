r"""Turn shards of documents and images into a corpus (docs/data.md).

python tools/preprocess_data.py --input data/docs_shard_*_v2.jsonl.zip --image-root images \
    --tokenizer-model tokenizer.model --output corpus --num-workers 16

Interrupted? Run the same command again: finished shards are not done again.
"""

from __future__ import annotations

import sys

import tyro

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.pages.corpus_report import write_report
from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from lcl_megatron.data.preprocessing.progress import Progress


def main() -> None:
    """Read the flags, write the corpus, print progress to stderr and the summary to stdout."""
    try:
        config = tyro.cli(PreprocessConfig, description=__doc__)
        summary = preprocess(config, Progress(sys.stderr))
        print(summary)
        page = config.output.with_name(f"{config.output.name}.statistics.html")
        write_report(summary.corpus, page)
        print(f"statistics: {page}")
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
