"""Tar files made on the spot, and the damage that real ones suffer."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Member = tuple[str, bytes] | tarfile.TarInfo


def write_tar(path: Path, members: Iterable[Member], format: int = tarfile.GNU_FORMAT) -> Path:
    """Write members, (name, bytes) or a header without bytes, in order; a name in .gz or .tgz is compressed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    data = buffer.getvalue()
    path.write_bytes(gzip.compress(data) if path.name.endswith(("gz",)) else data)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A header of a link, a device or a folder."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def sample(key: str, image: bytes, caption: str | None = None, record: dict[str, Any] | None = None) -> list[Member]:
    """The members of a sample in img2dataset's order: jpg, json, txt."""
    members: list[Member] = [(f"{key}.jpg", image)]
    if record is not None:
        members.append((f"{key}.json", json.dumps(record).encode()))
    if caption is not None:
        members.append((f"{key}.txt", caption.encode()))
    return members
