"""Files that do harm to whoever unpickles them."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch


class Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def zipped(harm: Harm) -> bytes:
    """Return it as ``torch.save`` writes it."""
    stream = io.BytesIO()
    torch.save({"progress": harm}, stream)
    return stream.getvalue()
