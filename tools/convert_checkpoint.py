"""Turn a checkpoint into folders of stock libraries (docs/export.md), and weights of others into a start for runs.

python tools/convert_checkpoint.py export RUN/checkpoints EXPORT --verify

python tools/convert_checkpoint.py import open_clip:ViT-B-16/laion2b_s34b_b88k WEIGHTS --verify

python tools/convert_checkpoint.py official RUN/checkpoints released.pt --verify
"""

from __future__ import annotations

import sys

import tyro

from lcl_megatron.checkpoint.commands import COMMANDS
from lcl_megatron.checkpoint.stock_libraries import LibraryError


def main() -> int:
    """Run the subcommand named on the command line; return the exit status."""
    try:
        outcome = tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)
    except (OSError, ValueError, LibraryError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    print(outcome.text)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
