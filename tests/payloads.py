"""Hostile files for tests: each makes a folder, the mark, if what is in it is run.

mark = Mark(tmp_path)
write_torch_zip(path, PICKLES["reduce"](mark))
...                                                  # our loader reads path
assert not mark.was_made()
"""

from __future__ import annotations

import io
import json
import os
import pickle
import runpy
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Mark:
    """A folder that only a payload makes.

    Args:
        folder: where it would be made; what a payload writes beside it is of no interest.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "mark"

    @property
    def code(self) -> str:
        """Python that makes it."""
        return f"__import__('os').makedirs({str(self.path)!r}, exist_ok=True)"

    def was_made(self) -> bool:
        """Return whether a payload was run, and take its trace away."""
        if made := self.path.exists():
            self.path.rmdir()
        return made


class _Calls:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def _by_build(mark: Mark) -> bytes:
    """Code that runs while the state of a harmless object is set: by a property of a type made on the way."""
    made = f"type('T', (), {{'__setstate__': lambda self, state: {mark.code}}})()"
    return b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", len(made)) + made.encode() + b"\x85R}b."


def _by_memo(mark: Mark) -> bytes:
    """``os.mkdir`` under a name that only STACK_GLOBAL puts together, behind a dictionary that looks like weights."""
    weights = pickle.dumps({"state_dict": {"a": [0.0]}}, protocol=4)[:-1]
    return weights + pickle.dumps(_Calls(os.mkdir, str(mark.path)), protocol=4)[2:-1] + b"0."


def _by_script(mark: Mark) -> bytes:
    """A script beside the mark that ``runpy`` runs."""
    script = mark.path.with_suffix(".py")
    script.write_text(mark.code)
    return pickle.dumps(_Calls(runpy.run_path, str(script)))


PICKLES: dict[str, Callable[[Mark], bytes]] = {
    "reduce": lambda mark: pickle.dumps(_Calls(os.mkdir, str(mark.path)), protocol=2),
    "text": lambda mark: pickle.dumps(_Calls(os.mkdir, str(mark.path)), protocol=0),
    "frames": lambda mark: pickle.dumps(_Calls(os.mkdir, str(mark.path)), protocol=5),
    "exec": lambda mark: pickle.dumps(_Calls(exec, mark.code), protocol=2),
    "eval": lambda mark: pickle.dumps(_Calls(eval, mark.code), protocol=2),
    "shell": lambda mark: pickle.dumps(_Calls(os.system, f"mkdir '{mark.path}'"), protocol=2),
    "runpy": _by_script,
    "build": _by_build,
    "memo": _by_memo,
    "deep": lambda mark: pickle.dumps({"state_dict": {"a": [_Calls(os.mkdir, str(mark.path))]}}, protocol=2),
}
"""Pickles that make the mark when they are loaded, by what they do."""


def write_torch_zip(path: Path, content: bytes) -> None:
    """Write a file of ``torch.save`` whose pickle is ``content``."""
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, content if name.endswith("data.pkl") else source.read(name))


def write_torch_legacy(path: Path, content: bytes) -> None:
    """Write a file of torch before 1.6 (five pickles one behind the other) whose object is ``content``."""
    stream = io.BytesIO()
    torch.save({}, stream, _use_new_zipfile_serialization=False)
    head = stream.getvalue()
    magic, protocol, system = _first_pickles(head)
    path.write_bytes(magic + protocol + system + content + pickle.dumps([], protocol=2))


def _first_pickles(data: bytes) -> list[bytes]:
    stream, parts = io.BytesIO(data), []
    for _ in range(3):
        begin = stream.tell()
        pickle.load(stream)
        parts.append(data[begin : stream.tell()])
    return parts


def write_plain(path: Path, content: bytes) -> None:
    """Write nothing but the pickle."""
    path.write_bytes(content)


def write_object_array(path: Path, content: bytes) -> None:
    """Write an ``.npy`` file of Python objects, which numpy would unpickle."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    path.write_bytes(header.getvalue() + content)


def write_array_archive(path: Path, content: bytes) -> None:
    """Write a zip file with an array of Python objects, as ``np.savez`` does."""
    inner = path.with_suffix(".inner")
    write_object_array(inner, content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "arr_0.npy")
    inner.unlink()


TORCH_FILES: dict[str, Callable[[Path, bytes], None]] = {
    "zip": write_torch_zip,
    "legacy": write_torch_legacy,
    "plain": write_plain,
}
"""Files that ``torch.load`` would unpickle."""
ARRAY_FILES: dict[str, Callable[[Path, bytes], None]] = {
    "objects": write_object_array,
    "archive": write_array_archive,
    "plain": write_plain,
}
"""Files that ``np.load`` would unpickle."""


def write_remote_code(folder: Path, mark: Mark, config: dict[str, Any]) -> Path:
    """Write a folder for transformers whose configuration names classes in a file of its own, which makes the mark."""
    folder.mkdir(parents=True)
    (folder / "hostile.py").write_text(f"{mark.code}\nclass Hostile: pass\n")
    names = ("Config", "Model", "ModelForCausalLM", "ImageProcessor", "Processor", "VideoProcessor")
    remote = {f"Auto{name}": "hostile.Hostile" for name in names}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": remote}))
    tokenizer = {"tokenizer_class": "Hostile", "auto_map": {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Hostile", "auto_map": remote})
    )
    return folder
