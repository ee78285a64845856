"""Stock libraries in tests: there, or the test is skipped with the reason."""

from __future__ import annotations

from types import ModuleType

import pytest

from lcl_megatron.checkpoint.stock_libraries import LibraryError, stock_library


def stock_or_skip(name: str) -> ModuleType:
    """Return the module ``name``, or skip the test or module."""
    try:
        return stock_library(name)
    except LibraryError as error:
        pytest.skip(str(error), allow_module_level=True)
