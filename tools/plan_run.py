r"""Predict memory, best layout, traffic, step time and efficiency of a run before it is started (docs/planning.md).

python tools/plan_run.py --preset vit_l14_opt125m --device H100 --gpus 8 64 512 2048 --output plan.html

python tools/plan_run.py --preset vit_b16_opt125m --data-path corpus --device H200 --layout configured --gpus 64

All other flags are those of pretrain_lcl.py: --preset, --config and every setting. With --data-path the rows of the
corpus say what a row holds; otherwise --images-per-row, --fill and --documents-per-row do.
"""

from __future__ import annotations

import sys

import tyro

from lcl_megatron.config import ConfigError
from lcl_megatron.config.sources import load_run_config
from lcl_megatron.costs.commands import PlanFlags, plan_run
from lcl_megatron.costs.counts import RowMeans


def main() -> None:
    """Read the flags, print the plan."""
    flags, others = tyro.cli(PlanFlags, description=__doc__, return_unknown_args=True)
    try:
        config, means = load_run_config(others, prog="plan_run.py"), None
        if config.data.data_path:
            # Only a corpus needs torch.
            from lcl_megatron.data.planning.mixture import RowSequence
            from lcl_megatron.training.setup import open_corpora, with_vocabulary

            corpora = open_corpora(config)
            config = with_vocabulary(config, corpora)
            sequence = RowSequence(corpora, config.data, config.vision.num_patches, config.training.seed)
            means = RowMeans.of_sequence(sequence)
        print(plan_run(flags, config, means))
    except (ConfigError, OSError, ValueError) as error:
        sys.exit(f"plan_run: {error}")


if __name__ == "__main__":
    main()
