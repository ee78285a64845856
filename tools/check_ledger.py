"""Prove from its ledger that a run trained on every row once: ``python tools/check_ledger.py LEDGER_DIR``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from lcl_megatron.training.ledger_check import check_ledger
from lcl_megatron.training.ledger_reader import LedgerError


def main(folder: Annotated[Path, tyro.conf.Positional], from_step: int = 0) -> None:
    """Check that no row was lost or repeated, and that rows that were done again after an interruption were the same.

    The last line is JSON. The exit status is 1 if anything is wrong.

    Args:
        folder: Ledger of a run, its --ledger-dir.
        from_step: First step that must be there; above 0 where the run had begun before its ledger.
    """
    try:
        report = check_ledger(folder, from_step)
    except (LedgerError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report.table())
    print(report.to_json())
    sys.exit(1 if report.num_findings else 0)


if __name__ == "__main__":
    tyro.cli(main)
