"""Whole tensors out of the files of a distributed checkpoint, by one process: no ranks, no groups, no megatron-core.

torch's reader unpickles the file ``.metadata`` whatever it holds, and opens any path that it names. Here only the
classes that such a file consists of can be built, and only files inside the checkpoint are opened; tensors are read
with ``weights_only``.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

_PLAN = "torch.distributed.checkpoint.planner"
_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED_GLOBALS = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *((_PLAN, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
        *(
            (_METADATA, name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
    }
)
"""Classes and functions that ``.metadata`` may name; none of them does anything but hold values."""


class ShardError(ValueError):
    """Files of a distributed checkpoint that are damaged, or that name what they must not."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_GLOBALS:
            raise ShardError(f"it names {module}.{name}, which a checkpoint has no use for; it was not read further")
        return super().find_class(module, name)


class ShardReader(FileSystemReader):
    """Reads tensors of a distributed checkpoint that need not be trusted.

    Args:
        folder: the checkpoint, with ``.metadata`` and ``*.distcp``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the checkpoint holds and where.

        Raises:
            ShardError: ``.metadata`` is absent, damaged, or names anything but a checkpoint's tensors and files.
        """
        path = self.folder / ".metadata"
        try:
            with path.open("rb") as stream:
                metadata = _MetadataUnpickler(stream).load()
            files = {info.relative_path for info in metadata.storage_data.values()}
        except OSError as error:
            raise ShardError(f"cannot read {path}: {error.strerror}; the checkpoint is not complete") from error
        # A damaged pickle raises nearly anything.
        except Exception as error:
            raise ShardError(f"{path} is not the index of a checkpoint: {error}") from error
        if outside := [file for file in files if PurePath(file).name != file]:
            raise ShardError(f"{path} names files outside the checkpoint: {outside[0]!r}; it was not read further")
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return shape and dtype of every tensor of the checkpoint by name; nothing but ``.metadata`` is read.

        Raises:
            ShardError: see ``read_metadata``.
        """
        stored = self.read_metadata().state_dict_metadata.items()
        return {name: value for name, value in stored if isinstance(value, TensorStorageMetadata)}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return whole tensors by name, put together from the parts that the ranks wrote, in the dtype as saved.

        Raises:
            ShardError: a tensor or a file is absent or damaged.
        """
        tensors = self.tensors()
        names = list(names)
        if missing := [name for name in names if name not in tensors]:
            raise ShardError(f"{self.folder} has no tensors {', '.join(missing)}")
        state = {name: torch.empty(tensors[name].size, dtype=tensors[name].properties.dtype) for name in names}
        try:
            with warnings.catch_warnings():
                # That there are no ranks is the intent.
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                load(state, storage_reader=self, no_dist=True)
        # torch's reader raises nearly anything for a damaged file, and wraps it together with its traceback.
        except (Exception, CheckpointException) as error:
            failures = error.failures if isinstance(error, CheckpointException) else {}
            cause = next((cause for cause, _ in failures.values()), error)
            raise ShardError(
                f"cannot read the tensors of {self.folder}, a file is absent or damaged: {type(cause).__name__} {cause}"
            ) from error
        return state
