"""Pre-train a vision encoder: ``torchrun --nproc-per-node N pretrain_lcl.py --preset NAME --data-path CORPUS ...``.

``python pretrain_lcl.py --help`` lists every setting; ``lcl_megatron/training/ending.py`` the exit statuses.
"""

from __future__ import annotations

import sys

from lcl_megatron.training.ending import ExitStatus
from lcl_megatron.training.launcher import die_with_launcher
from lcl_megatron.training.stop import StopSignal


def main() -> ExitStatus:
    """Train as the command line says; return the exit status."""
    die_with_launcher()
    with StopSignal() as stop:
        # Imported now: torch and megatron-core take seconds, in which the process can already be told to stop.
        from lcl_megatron.config.sources import load_run_config
        from lcl_megatron.training.failure import exit_status
        from lcl_megatron.training.loop import train
        from lcl_megatron.training.setup import run_from

        def run() -> ExitStatus:
            with run_from(load_run_config(sys.argv[1:]), stop) as run:
                return train(run).status

        return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
