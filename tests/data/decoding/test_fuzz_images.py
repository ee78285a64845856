"""Damaged images of every kind, read through the real loader in processes of their own.

Oracles: what each kind of damage must lead to, and the same corpus with intact images.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lcl_megatron.data.decoding.dali_decoder import has_dali

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "fuzz_images.py"


@pytest.mark.parametrize(
    ("backend", "count", "seed"),
    [
        ("cpu", 240, 5),
        pytest.param("dali_cpu", 60, 6, marks=pytest.mark.skipif(not has_dali(), reason="DALI is not installed")),
    ],
)
def test_damaged_images_change_nothing_but_themselves(backend: str, count: int, seed: int) -> None:
    command = [sys.executable, str(SCRIPT), f"--images={count}", f"--seed={seed}", f"--image-backend={backend}"]
    environment = {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["images"] == count
    assert result["crashes"] == result["hangs"] == 0, done.stderr
    assert result["others_unchanged"], done.stdout
    assert result["counted"], done.stdout
    assert "unexpected" not in done.stdout
    if backend == "cpu":
        assert result["rss_above_idle_mb"] <= 500
