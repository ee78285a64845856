"""Versions of the software that results, exports and reports are made with."""

from __future__ import annotations

import platform
from importlib import metadata

from lcl_megatron import __version__

PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "pillow",
    "scikit-learn",
    "safetensors",
    "timm",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "open_clip_torch",
    "pycocoevalcap",
)
"""Packages whose versions may change a figure."""


def software_versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of those of ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version(), "lcl_megatron": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
