"""Compare the ``official`` recipe with a recorded case of the released code: ``check_reference.py CASE.safetensors``.

``CASE.json`` must lie beside it. Prints the largest relative error of every output, loss and gradient; exit status 1
if one is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lcl_megatron.checkpoint.reference_case import ReferenceCase, compare


def main() -> int:
    """Compare the cases named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE.safetensors")
    failed = 0
    for path in parser.parse_args().cases:
        comparisons = compare(ReferenceCase.load(path))
        print(f"{path.stem}: largest error relative to the largest recorded entry")
        for comparison in comparisons:
            verdict = "ok" if comparison.passed else f"BEYOND {comparison.tolerance:g}"
            print(f"  {comparison.error:9.2e}  {verdict:<8}  {comparison.name}")
        beyond = sum(not comparison.passed for comparison in comparisons)
        failed += beyond
        print(f"{path.stem}: {len(comparisons)} compared, {beyond} beyond tolerance")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
