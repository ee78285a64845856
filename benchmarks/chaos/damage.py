"""Ways to damage a folder of files, one at a time, each undone afterwards.

Every damage changes what is on disk: a hole is only made where there was something, a swap only of files that differ.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Undo = Callable[[], None]
LONGEST_HOLE = 4096
TRIES = 20
ADDED = "file added"
"""This kind leaves everything as it was that is ever read."""
ADDITIONS = (("metadata.json", b"{}"), (".metadata", b"cos\nsystem\n(S'true'\ntR."), ("x.safetensors", b"x"))


class NothingToDamageError(RuntimeError):
    """The folder has no place for this kind of damage."""


@dataclass(frozen=True)
class Damage:
    """What was done."""

    kind: str
    """One of ``KINDS``."""
    file: str
    """Which file."""
    detail: str
    """Where and how."""


@contextmanager
def damaged(kind: str, folder: Path, other: Path, rng: random.Random) -> Iterator[Damage]:
    """Damage one file of a folder, and undo it; see ``damage``."""
    file, detail, undo = KINDS[kind](folder, rng, other)
    try:
        yield Damage(kind, file, detail)
    finally:
        undo()


def damage(kind: str, folder: Path, other: Path, rng: random.Random) -> Damage:
    """Damage one file of a folder.

    Args:
        kind: one of ``KINDS``.
        folder: what is damaged.
        other: a folder of the same files with other content: another step's checkpoint, another corpus.
        rng: chooses file and place.
    """
    file, detail, _ = KINDS[kind](folder, rng, other)
    return Damage(kind, file, detail)


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def _pick(folder: Path, rng: random.Random) -> Path:
    """Return a file: half of the time in proportion to its size, else all alike, so that small ones get their share."""
    files = [path for path in files_of(folder) if path.stat().st_size]
    sizes = [path.stat().st_size for path in files]
    return rng.choices(files, sizes)[0] if rng.random() < 0.5 else rng.choice(files)


def _replace(path: Path, content: bytes) -> Undo:
    before = path.read_bytes()
    if content == before:
        raise NothingToDamageError(f"{path} would stay as it is")
    path.write_bytes(content)
    return lambda: path.write_bytes(before) and None


def _bit(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    path = _pick(folder, rng)
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << (bit % 8)
    return path.name, f"bit {bit}", _replace(path, bytes(content))


def _hole(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    for _ in range(TRIES):
        path = _pick(folder, rng)
        content = bytearray(path.read_bytes())
        begin = rng.randrange(len(content))
        end = min(len(content), begin + rng.randint(1, LONGEST_HOLE))
        if any(content[begin:end]):
            content[begin:end] = bytes(end - begin)
            return path.name, f"bytes {begin} to {end}", _replace(path, bytes(content))
    raise NothingToDamageError("nothing but zeros was found")


def _truncated(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    path = _pick(folder, rng)
    length = rng.randrange(path.stat().st_size)
    return path.name, f"cut to {length} bytes", _replace(path, path.read_bytes()[:length])


def _longer(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    path = _pick(folder, rng)
    more = rng.randbytes(rng.randint(1, 100))
    return path.name, f"{len(more)} bytes more", _replace(path, path.read_bytes() + more)


def _empty(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    path = _pick(folder, rng)
    return path.name, "no bytes", _replace(path, b"")


def _missing(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    path = rng.choice(files_of(folder))
    content = path.read_bytes()
    path.unlink()
    return path.name, "removed", lambda: path.write_bytes(content) and None


def _swapped(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    """Swap two files of one kind, of the same size if there are such."""
    pairs = [
        (first, second)
        for first in files_of(folder)
        for second in files_of(folder)
        if first < second and first.suffix == second.suffix and first.read_bytes() != second.read_bytes()
    ]
    alike = [(first, second) for first, second in pairs if first.stat().st_size == second.stat().st_size]
    if not pairs:
        raise NothingToDamageError("there are no two files of one kind that differ")
    first, second = rng.choice(alike or pairs)
    contents = first.read_bytes(), second.read_bytes()

    def write(left: bytes, right: bytes) -> None:
        first.write_bytes(left)
        second.write_bytes(right)

    write(*reversed(contents))
    return first.name, f"swapped with {second.name}", lambda: write(*contents)


def _foreign(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    """Put the file of the same name of another checkpoint or corpus in its place."""
    common = [path for path in files_of(folder) if (other / path.name).is_file()]
    for path in rng.sample(common, len(common)):
        if path.read_bytes() != (other / path.name).read_bytes():
            return path.name, f"from {other.name}", _replace(path, (other / path.name).read_bytes())
    raise NothingToDamageError(f"{folder} and {other} have no file that differs")


def _manifest(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    path = folder / "manifest.json"
    return path.name, f"from {other.name}", _replace(path, (other / path.name).read_bytes())


def _edited(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    """Change one value in a file of text as an editor would: it stays readable."""
    path = rng.choice([path for path in files_of(folder) if path.suffix in (".json", ".toml")])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        number = rng.choice(list(re.finditer(r"= \d*(\d)", text)))
        digit = (int(number[1]) + rng.randint(1, 9)) % 10
        changed = f"{text[: number.start(1)]}{digit}{text[number.end(1) :]}"
        return path.name, f"digit at {number.start(1)}", _replace(path, changed.encode())
    content = json.loads(text)
    owner, key = rng.choice(list(_leaves(content)))
    owner[key] = _other_value(owner[key], rng)
    return path.name, f"field {key!r}", _replace(path, json.dumps(content, indent=1).encode())


def _leaves(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every value."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, dict | list) and value:
            yield from _leaves(value)
        else:
            yield content, key


def _other_value(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + rng.randint(1, 9)
    if isinstance(value, str) and value:
        place = rng.randrange(len(value))
        return value[:place] + ("1" if value[place] != "1" else "2") + value[place + 1 :]
    return "1"


def _renamed(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    """Give a checkpoint the name of a later step."""
    later = folder.with_name(f"step-{int(folder.name.split('-')[1]) + rng.randint(1, 1000):08d}")
    folder.rename(later)
    return folder.name, f"renamed to {later.name}", lambda: later.rename(folder) and None


def _added(folder: Path, rng: random.Random, other: Path) -> tuple[str, str, Undo]:
    """Add a file that the manifest does not name, such as megatron-core's."""
    name, content = rng.choice(
        [("metadata.json", b"{}"), (".metadata", b"cos\nsystem\n(S'true'\ntR."), ("x.bin", b"x")]
    )
    path = folder / name
    path.write_bytes(content)
    return name, "added", path.unlink


KINDS: dict[str, Callable[[Path, random.Random, Path], tuple[str, str, Undo]]] = {
    "one bit": _bit,
    "hole of zeros": _hole,
    "cut short": _truncated,
    "longer": _longer,
    "empty file": _empty,
    "missing file": _missing,
    "two files swapped": _swapped,
    "file of another": _foreign,
    "manifest of another": _manifest,
    "edited field": _edited,
    "folder renamed": _renamed,
    ADDED: _added,
}
"""Name -> what applies it and returns file, detail and what undoes it."""
