"""Prove that checkpoints and corpora are whole: ``python tools/verify.py SAVE CORPUS ...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from lcl_megatron.checkpoint.verification import verify_paths


def main(paths: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Read every file and compare its SHA-256 with the manifest.

    The last line is JSON. The exit status is 1 if anything is damaged.

    Args:
        paths: Checkpoints, folders that hold some, corpora.
    """
    findings = verify_paths(paths)
    for finding in findings:
        print(f"{finding.path}: {finding.text}" if finding.is_whole else f"DAMAGED: {finding.text}")
    whole = sum(finding.is_whole for finding in findings)
    print(json.dumps({"whole": whole, "damaged": len(findings) - whole}))
    sys.exit(0 if findings and whole == len(findings) else 1)


if __name__ == "__main__":
    tyro.cli(main)
