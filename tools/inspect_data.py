r"""Show what training reads: rows of any step, and the statistics of a corpus (docs/data.md).

python tools/inspect_data.py --preset vit_b16_opt125m --data-path corpus --step 1000 --output step.html

python tools/inspect_data.py --data-path corpus --statistics corpus.statistics.html

All other flags are those of pretrain_lcl.py: --preset, --config, --data-path, --seed and every setting; the same
flags give the same rows. Without --output the rows are printed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from lcl_megatron.config.errors import ConfigError, require
from lcl_megatron.config.sources import load_run_config
from lcl_megatron.config.validate import data_parallel_size, validate
from lcl_megatron.data.pages.corpus_report import write_report
from lcl_megatron.data.pages.step_page import write_step_page
from lcl_megatron.data.pages.step_text import render_step
from lcl_megatron.data.pages.step_view import Selection, view_step
from lcl_megatron.data.storage.indexed_file import CorpusError
from lcl_megatron.training.setup import build_plan, open_corpora, with_vocabulary


@dataclass(frozen=True)
class Inspection(Selection):
    """What is shown, and where."""

    world_size: int = 0
    """Processes of the run, which say who gets which row; 0 = a single data-parallel rank."""
    output: Path | None = None
    """HTML page of the rows to write; without it they are printed."""
    statistics: Path | None = None
    """HTML page of the corpus's statistics to write; without --output then nothing else is done."""


def main() -> None:
    """Read the flags, show what they ask for."""
    inspection, others = tyro.cli(Inspection, description=__doc__, return_unknown_args=True)
    try:
        config = load_run_config(others, prog="inspect_data.py")
        corpora = open_corpora(config)
        if inspection.statistics is not None:
            require(len(corpora) == 1, f"--statistics is of one corpus; --data-path names {len(corpora)}: give one")
            write_report(corpora[0], inspection.statistics)
            print(f"wrote {inspection.statistics}")
            if inspection.output is None:
                return
        config = with_vocabulary(config, corpora)
        parallel = config.parallel
        replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        world_size = inspection.world_size or replica * parallel.context_parallel_size
        validate(config, world_size)
        plan = build_plan(config, corpora, data_parallel_size(config, world_size))
        view = view_step(plan, config.vision.image_size, inspection)
        if inspection.output is None:
            print(render_step(view))
        else:
            write_step_page(view, inspection.output)
            print(f"wrote {inspection.output}")
    except (ConfigError, CorpusError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
