"""Evaluate image encoders on transfer tasks: exported folders, timm, CLIP and OpenCLIP in the same table.

python tools/evaluate.py classification --encoder EXPORT timm:vit_base_patch16_224 --data imagenet --output results
torchrun --nproc-per-node 8 tools/evaluate.py classification ...
"""

from __future__ import annotations

import sys

import tyro

from lcl_megatron.checkpoint.stock_libraries import LibraryError
from lcl_megatron.evaluation.commands import COMMANDS
from lcl_megatron.parallel.replicas import ReplicaError


def main() -> None:
    """Run a subcommand."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)
    except (OSError, ValueError, LibraryError, ReplicaError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
