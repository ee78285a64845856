"""The benchmarks of preprocessing, in short forms.

Oracles: for runs under SIGKILL, the SHA-256 of every file of an undisturbed run; for speeds, arithmetic between the
figures, and the numbers of documents and images that were put into the shards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.preprocess_runs import write_shards

ROOT = Path(__file__).parents[3]


def run(script: str, *arguments: object) -> dict[str, Any]:
    """Run a benchmark in a process of its own, which may fork and be the parent of workers; return its last line."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes():
    """At random moments; ``test_corpus_writer`` kills before every single operation on files."""
    result = run("preprocess_kills.py", "--kills", 10, "--documents", 60)
    assert result["kills"] == sum(result["targets"].values()) == 10
    assert result["identical"] == result["corpora"] > 0
    assert result["torn"] == 0


def test_speeds_of_synthetic_documents():
    result = run("preprocess.py", "--shards", 4, "--documents", 10, "--image-side", 64, "--repeats", 1)
    assert result["documents"] == 40
    assert 40 <= result["images"] <= 240
    ratio = result["documents_per_s_core"] / result["images_per_s_core"]
    assert ratio == pytest.approx(40 / result["images"], rel=1e-3)
    assert result["scaling_2"] == pytest.approx(result["documents_per_s_2"] / result["documents_per_s_1"], rel=1e-3)


def test_speeds_of_given_shards(mmc4, tokenizer_path):
    shards = write_shards(mmc4)
    given = ("--input", *shards, "--image-root", mmc4.images, "--tokenizer-model", tokenizer_path)
    result = run("preprocess.py", *given, "--repeats", 1)
    assert result["documents"] > 10
    assert all(value > 0 for value in result.values())
