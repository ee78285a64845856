"""timm, transformers and open_clip: imported when they are needed, with an error that says how to get them.

All three import torchvision. Its wheels on PyPI are built for CUDA; beside a torch without CUDA their compiled part
cannot be loaded, and ``import torchvision`` then fails because it registers shapes for two operators that do not exist
(pytorch/vision issue 9077). Declaring the two is enough: transforms work, only the operators themselves do not, and
nothing here uses them.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class LibraryError(RuntimeError):
    """A stock library is absent, or cannot be imported."""


def stock_library(name: str) -> ModuleType:
    """Return the module ``name``: ``timm``, ``transformers``, ``open_clip`` or a submodule of one.

    Raises:
        LibraryError: it is not installed or does not import; the message says what to install.
    """
    make_torchvision_importable()
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        raise LibraryError(
            f"{name} cannot be imported ({error}); install the stock libraries: pip install 'lcl_megatron[eval]', "
            "with a torchvision that fits this torch"
        ) from error


@functools.cache
def make_torchvision_importable() -> None:
    """Import torchvision, if it is installed, declaring the operators that its compiled part could not provide."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
        # The library object must live as long as the operators.
        _declared.append(library)
        importlib.import_module("torchvision")


_declared: list[torch.library.Library] = []
