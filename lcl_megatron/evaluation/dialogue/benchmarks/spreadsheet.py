"""Tables of answers for servers that take a spreadsheet."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_spreadsheet(header: Sequence[str], rows: Sequence[Sequence[Any]], path: Path) -> list[Path]:
    """Write a table as ``PATH.tsv``, and as ``PATH.xlsx`` if openpyxl is installed; return what was written.

    Args:
        header: names of the columns.
        rows: cells, text or numbers.
        path: of the files, without an ending.
    """
    written = [path.with_suffix(".tsv")]
    with written[0].open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    try:
        workbook = importlib.import_module("openpyxl").Workbook(write_only=True)
    except ModuleNotFoundError:
        return written
    sheet = workbook.create_sheet()
    for row in (header, *rows):
        sheet.append(list(row))
    written.append(path.with_suffix(".xlsx"))
    workbook.save(written[1])
    return written
