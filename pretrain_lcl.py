"""Pre-train a vision encoder: ``torchrun --nproc-per-node N pretrain_lcl.py --preset NAME --data-path CORPUS ...``.

``python pretrain_lcl.py --help`` lists every setting.
"""

from __future__ import annotations

import sys

from lcl_megatron.config.sources import load_run_config
from lcl_megatron.training.failure import exit_status
from lcl_megatron.training.loop import train
from lcl_megatron.training.setup import run_from


def main() -> None:
    """Train as the command line says."""
    with run_from(load_run_config(sys.argv[1:])) as run:
        train(run)


# megatron-core's checkpoint writer starts a process that imports this file again.
if __name__ == "__main__":
    sys.exit(exit_status(main))
