"""Files of tensors with the permissions that any other file would get."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that the libraries of others read; one that is there is replaced.

    Args:
        state: contiguous tensors by name, none of which share memory.
        path: the file; its folder must exist.

    Raises:
        OSError: the folder is missing or the disk is full.
        SafetensorError: safetensors cannot write the file.
    """
    # safetensors >= 0.8 writes a temporary file that only its owner may read, and renames it: on a cluster nobody else
    # could load an export. An ordinary file tells which permissions the umask leaves.
    path.touch()
    mode = path.stat().st_mode & 0o777
    # transformers reads only files that say in which framework they were made.
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(mode)
