"""``tools/evaluate.py``, as a user calls it, alone and under torchrun.

Oracles: exit statuses, the files it leaves, and one process against two.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.transfer.small_sets import ENCODER, write_captioned, write_folders
from tests.stock import stock_or_skip

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "evaluate.py"
FAST = ("--set", "fit.steps=20", "fit.batch_size=12", "fit.lr=0.01", "fit.warmup_steps=2")


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """Run the tool in this process; return what it gave to ``sys.exit``, None if nothing."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        runpy.run_path(str(TOOL), run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def metrics(folder: Path) -> dict[str, dict[str, float]]:
    results = json.loads((folder / "results.json").read_text())["results"]
    return {result["encoder"]["name"]: {m["name"]: m["mean"] for m in result["metrics"]} for result in results}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    stock_or_skip("timm")
    write_folders(tmp_path / "data", "train", 8)
    write_folders(tmp_path / "data", "val", 5)
    return tmp_path / "data"


def test_two_encoders_share_a_table_with_a_third_of_another_call(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = ("classification", "--data", data, "--preset", "cpu", *FAST)
    assert evaluate(monkeypatch, *task, "--encoder", f"a={ENCODER}", f"b={ENCODER}", "--output", tmp_path / "1") is None
    found = metrics(tmp_path / "1")
    assert found["a"] == found["b"]
    assert found["a"]["top-1"] > 0.8
    assert not (tmp_path / "1" / "states").exists()
    assert "training" not in capsys.readouterr().err

    full = (*task, "--mode", "full", "--seeds", "0", "1", "--encoder", f"c={ENCODER}", "--output", tmp_path / "2")
    assert evaluate(monkeypatch, *full) is None
    capsys.readouterr()
    assert evaluate(monkeypatch, "table", "--results", tmp_path / "1", tmp_path / "2") is None
    table = capsys.readouterr().out
    assert [line[:5] for line in table.splitlines()[4:7]] == ["| a |", "| b |", "| c |"]
    assert "| c | full | 2 |" in table
    merged = ("table", "--results", tmp_path / "1", tmp_path / "2", "--output", tmp_path / "3")
    assert evaluate(monkeypatch, *merged) is None
    printed = capsys.readouterr().out
    assert printed.startswith(table)
    assert printed.endswith(f"wrote {tmp_path / '3'}/results.json, results.md and results.png\n")
    assert list(metrics(tmp_path / "3")) == ["a", "b", "c"]


def test_retrieval_and_probe(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_or_skip("open_clip")
    file = write_captioned(tmp_path / "captions", 15, split_at=12)
    images = tmp_path / "captions" / "images"
    train = ("--train", file, "--train-images", images, "--train-split", "train")
    tests = ("--test", file, file, "--test-images", images, "--preset", "cpu")
    call = ("retrieval", *train, *tests, *FAST, "--encoder", ENCODER, "--output", tmp_path / "r")
    assert evaluate(monkeypatch, *call) is None
    assert len(json.loads((tmp_path / "r" / "results.json").read_text())["results"]) == 2
    wrong = (*call, "--test-images", images, images, images)
    assert "--test-images names 3 folders for 2 test sets" in evaluate(monkeypatch, *wrong)

    probe = ("probe", "--data", data, "--encoder", f"a={ENCODER}", "--output", tmp_path / "p")
    assert evaluate(monkeypatch, *probe) is None
    assert metrics(tmp_path / "p")["a"].keys() == {"linear probe", "k-NN"}


@pytest.mark.slow
def test_torchrun_finds_what_one_process_finds(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = ("classification", "--data", data, "--preset", "cpu", *FAST, "--encoder", f"a={ENCODER}")
    assert evaluate(monkeypatch, *task, "--output", tmp_path / "1") is None
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, str(TOOL), *map(str, task), "--output", str(tmp_path / "2")],
        capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("top-1") == 1
    assert metrics(tmp_path / "1") == metrics(tmp_path / "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classification", "--data", "nowhere"), "evaluate: there is no data folder nowhere"),
        (("classification", "--data", "nowhere", "--preset", "zork"), "evaluate: there is no preset 'zork'"),
        (("classification", "--data", "nowhere", "--seeds", "1", "1"), "evaluate: --seeds 1 1: one is there twice"),
        (("probe", "--data", "nowhere"), "evaluate: there is no data folder nowhere"),
        (("retrieval", "--train", "nowhere", "--test", "nowhere"), "evaluate: there is no caption file nowhere"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    call = (*arguments, "--encoder", ENCODER, "--output", tmp_path)
    assert str(evaluate(monkeypatch, *call)).startswith(message)
    assert evaluate(monkeypatch, "table", "--results", tmp_path / "no") == (
        f"evaluate: there are no results at {tmp_path / 'no'}; give a folder or file that tools/evaluate.py wrote"
    )
