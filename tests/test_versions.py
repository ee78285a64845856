"""Oracle: what the packages say of themselves."""

from __future__ import annotations

import platform

import numpy
import torch

import lcl_megatron
from lcl_megatron.versions import PACKAGES, software_versions


def test_versions_are_those_that_run() -> None:
    found = software_versions()
    # A wheel for one kind of device says so behind a plus sign, in torch's own version and not always in the wheel's.
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["numpy"] == numpy.__version__
    assert found["python"] == platform.python_version()
    assert found["lcl_megatron"] == lcl_megatron.__version__
    assert found.keys() <= {"python", "lcl_megatron", *PACKAGES}
