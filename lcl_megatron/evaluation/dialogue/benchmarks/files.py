"""Reading and writing what all benchmarks are made of: JSON, JSON lines and tab-separated tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lcl_megatron.data.readers.records import RecordError, get_field, kind_name, parse_json
from lcl_megatron.evaluation.dialogue.benchmark import BenchmarkError

FETCH = "fetch it again from the benchmark's site, or give another path"


@contextmanager
def records_of(path: Path) -> Iterator[None]:
    """Turn what is wrong with a record into a ``BenchmarkError`` that names the file."""
    try:
        yield
    except RecordError as error:
        raise BenchmarkError(f"{path}: {error.reason}: {error.detail}; {FETCH}") from error


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file; raises ``BenchmarkError`` if there is none."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise BenchmarkError(f"there is no file {path}; {FETCH}") from error
    except IsADirectoryError as error:
        raise BenchmarkError(f"{path} is a folder; name the file in it") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8 text ({error.reason} at {error.start}); {FETCH}") from error


def read_json(path: Path, kind: type) -> Any:
    """Return the JSON value of a file, which must be of a kind (``dict`` or ``list``); raises ``BenchmarkError``."""
    with records_of(path):
        value = parse_json(read_text(path))
    if not isinstance(value, kind):
        raise BenchmarkError(f"{path} holds {kind_name(value)}; expected {kind.__name__}: it is another file")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one per line; raises ``BenchmarkError`` with the line."""
    records = []
    # Not splitlines: JSON texts may hold other line ends, such as U+2028, as they are.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except RecordError as error:
            raise BenchmarkError(f"{path}:{number}: {error.reason}: {error.detail}; {FETCH}") from error
        if not isinstance(record, dict):
            raise BenchmarkError(f"{path}:{number}: {kind_name(record)}; expected an object")
        records.append(record)
    return records


def list_of(record: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    """Return a field that is a list of objects; raises ``BenchmarkError``."""
    with records_of(path):
        entries = get_field(record, key, list)
    wrong = next((index for index, entry in enumerate(entries) if not isinstance(entry, dict)), None)
    if wrong is not None:
        raise BenchmarkError(f"{path}: {key}[{wrong}] is {kind_name(entries[wrong])}; expected an object")
    return list(entries)


def write_json(value: Any, path: Path) -> Path:
    """Write a JSON file and return its path."""
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_json_lines(records: Iterable[dict[str, Any]], path: Path) -> Path:
    """Write one object per line and return the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def one_line(text: str) -> str:
    """Return an answer that cannot break a table: white space of any kind becomes a single space."""
    return " ".join(text.split())
