"""The command-line tools, as a user calls them, one after the other: shards and images to a probed encoder.

Oracles: exit statuses, and the files that each tool leaves, read by the next tool and by json.
"""

from __future__ import annotations

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lcl_megatron.config.toml import to_toml
from tests.html_page import read_page
from tests.reference_lcl import Sizes, record_case
from tests.training.small_runs import DataFolder, plain_document, small_config, train_and_read

ROOT = Path(__file__).parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def run_tool(tool: str, *arguments: object) -> tuple[int, str]:
    """Run a tool in a process of its own; return its exit status and both of its outputs."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    output = result.stdout + result.stderr
    assert "Traceback" not in output
    return result.returncode, output


def call(tool: str, *arguments: object) -> str:
    """Run a tool that must succeed; return both of its outputs."""
    status, output = run_tool(tool, *arguments)
    assert status == 0, output
    return output


def ending_of(tool: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """Run a tool in this process, which is faster; return what it gave to ``sys.exit``."""
    monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    return caught.value.code


@pytest.mark.parametrize("tool", TOOLS)
def test_help_says_what_the_tool_is_for(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending_of(tool, monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    assert "usage:" in output
    assert len(output.splitlines()) > 5
    assert len((ROOT / "tools" / f"{tool}.py").read_text().splitlines()) <= 80


def test_from_shards_to_a_probed_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(16)])
    (data.images / "3a.png").unlink()
    model, corpus = tmp_path / "tokenizer.model", tmp_path / "corpus"

    output = call("train_tokenizer", "--input", data.shard, "--output", model, "--vocab-size", 330)
    assert f"{model}: 330 token ids, fingerprint " in output

    source = ("--input", data.shard, "--image-root", data.images, "--tokenizer-model", model, "--output", corpus)
    output = call("preprocess_data", *source)
    assert "documents  16" in output
    assert "images     31 " in output
    assert "1 missing file" in output
    assert str(ending_of("preprocess_data", monkeypatch, *source)).startswith("error: ")

    train_and_read(
        small_config(
            corpus,
            training={"train_iters": 4},
            checkpoint={"save": str(tmp_path / "save")},
            logging={"log_dir": str(tmp_path / "logs")},
        )
    )

    output = call("plot_curves", tmp_path / "logs", "--output", tmp_path / "all.html", "--names", "digits")
    assert f"wrote {tmp_path / 'all.html'}" in output
    assert "loss/generation" in (tmp_path / "all.html").read_text()
    assert str(ending_of("plot_curves", monkeypatch, tmp_path / "nowhere")).startswith("plot_curves: ")

    labels = tmp_path / "labels.csv"
    names = sorted(path.name for path in data.images.iterdir())
    with labels.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_name", "split", "label"])
        writer.writerows((name, ("probe_train", "test")[i % 4 == 3], i % 2) for i, name in enumerate(names))
    images = ("--labels", labels, "--image-root", data.images)
    output = call("probe", tmp_path / "save", *images, "--output", tmp_path / "probe.json")
    reports = json.loads((tmp_path / "probe.json").read_text())
    assert [report["encoder"] for report in reports] == ["trained", "untrained"]
    assert reports[0]["num_train"] + reports[0]["knn"]["num_examples"] == len(names)
    assert "| trained " in output
    assert "no complete checkpoint" in str(ending_of("probe", monkeypatch, tmp_path / "logs", *images))


def test_inspect_data_shows_rows_and_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(16)])
    (data.images / "3a.png").unlink()
    corpus = data.preprocess().corpus.path
    run, page, statistics = (tmp_path / name for name in ("run.toml", "step.html", "corpus.statistics.html"))
    run.write_text(to_toml(small_config(corpus)))
    rows = ("--config", run, "--step", 3)

    output = call("inspect_data", *rows, "--rows", 2, "--micro-batch", 1, "--micro-batch-size", 2)
    assert "step 3: rows 12 to 15, " in output
    assert output.count("\nrow ") == output.count("micro-batch 1, row ") == 2
    output = call("inspect_data", *rows, "--output", page, "--statistics", statistics)
    assert output.splitlines() == [f"wrote {statistics}", f"wrote {page}"]
    assert len(read_page(page).all("section")) == 4
    assert "missing file" in read_page(statistics).text
    statistics.unlink()
    assert call("inspect_data", "--data-path", corpus, "--statistics", statistics) == f"wrote {statistics}\n"
    assert statistics.exists()

    assert "error: data.data_path is empty" in str(ending_of("inspect_data", monkeypatch))
    wrong = ending_of("inspect_data", monkeypatch, *rows, "--dp-rank", 1)
    assert str(wrong).startswith("error: dp_rank = 1: the step has 1 of them")
    assert "--world-size" in str(wrong)


def test_check_reference_reads_a_recorded_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(
        image_size=8,
        patch_size=4,
        vision_width=16,
        vision_layers=1,
        vision_head_width=16,
        text_width=24,
        text_layers=1,
        text_heads=1,
        pool_heads=1,
        vocab_size=33,
        context_length=40,
    )
    case = record_case(tmp_path, "case", sizes, [(5, 0, 1), (1, 0, 12)])
    assert "0 beyond tolerance" in call("check_reference", case)
    description = json.loads(case.with_suffix(".json").read_text())
    description["generation_loss"] *= 1.01
    case.with_suffix(".json").write_text(json.dumps(description))
    assert ending_of("check_reference", monkeypatch, case) == 1
