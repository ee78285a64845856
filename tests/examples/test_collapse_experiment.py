"""The experiment on the collapse of the encoder, from end to end on a set made here.

Oracles: the runs' own reports and checkpoints, read by the library's tools; files that a second start must leave as
they are; colours, which an encoder cannot miss.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lcl_megatron.config.toml import from_toml
from lcl_megatron.data.storage.folder_lock import lock_folder
from lcl_megatron.evaluation.checkpoint_encoder import probe_checkpoint
from tests.examples.collapse_runs import EXPERIMENT, IMAGES, PRESET, ROOT, Experiment, make_data
from tests.html_page import assert_harmless, read_page
from tests.training.small_runs import read_reports


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("collapse")
    make_data(folder / "paint")
    (folder / "mini.toml").write_text(PRESET)
    made = Experiment(folder / "paint", folder / "mini.toml", folder / "out")
    done = made.command()
    assert done.returncode == 0, done.stderr
    made.printed = done.stdout
    return made


def test_the_last_line_is_what_results_json_says(experiment: Experiment) -> None:
    result = json.loads(experiment.printed.splitlines()[-1])
    assert result == experiment.results
    assert (result["corpus"], result["preset"]) == ("paint", "mini")
    trained = {"lcl", "contrast_only", "generation_only", "generation_regression", "clip"}
    assert result["linear"].keys() == result["knn"].keys() == trained | {"untrained", "supervised"}
    assert result["text_loss"].keys() == trained - {"contrast_only", "clip"}
    controls = {"generation_only_pairs", "generation_only_control"}
    assert result["control"]["linear"].keys() == result["control"]["text_loss"].keys() == controls
    for name, figure in result["linear"].items():
        values = [experiment.run(f"{name}-{seed}")["linear"] for seed in (1, 2)]
        assert figure["mean"] == pytest.approx(sum(values) / 2, abs=1e-4)
        assert figure["low"] <= figure["mean"] <= figure["high"]
        assert figure["seeds"] == 2
    assert result["cpu_minutes"] > 0


def test_every_method_sees_the_same_number_of_images(experiment: Experiment) -> None:
    result = experiment.results
    assert result["images_seen"]["untrained"] == 0
    for name, seen in result["images_seen"].items():
        if name != "untrained":
            assert abs(seen - (600 if name.endswith("pairs") else 480)) <= 24, name
            steps = experiment.run(f"{name}-1")["steps"]
            # As nearly as whole rows of about three pairs, or of two documents, allow.
            assert seen / steps == pytest.approx(24, rel=0.1), name
    for name in ("lcl", "clip", "generation_only_control"):
        report = read_reports(experiment.output / "runs" / f"{name}-1")[-1]
        assert report["data/consumed_images"] == experiment.run(f"{name}-1")["images_seen"]


def test_methods_differ_in_what_they_say_and_seeds_in_the_seed(experiment: Experiment) -> None:
    def config(name: str) -> Any:
        job = json.loads((experiment.output / "runs" / name / "job.json").read_text())
        return from_toml(job["config"], name)

    def weights(name: str) -> tuple[float, float, float]:
        loss = config(name).loss
        return loss.generation_loss_weight, loss.contrastive_loss_weight, loss.latent_regression_loss_weight

    lcl = config("lcl-1")
    assert weights("lcl-1") == (1.0, 0.1, 0.0)
    assert weights("contrast_only-1") == weights("clip-1") == (0.0, 0.1, 0.0)
    for name in ("generation_only-1", "generation_only_control-1", "generation_only_pairs-1"):
        assert weights(name) == (1.0, 0.0, 0.0)
    pairs = config("generation_only_pairs-1").data
    assert (pairs.view, pairs.pair_placement, pairs.data_path) == (("pairs",), "image_first", lcl.data.data_path)
    assert weights("generation_regression-1") == (1.0, 0.0, 1.0)
    assert (config("clip-1").data.view, config("clip-1").data.pair_placement) == (("pairs",), "text_first")
    assert config("generation_only_control-1").data.data_path != lcl.data.data_path == config("clip-1").data.data_path
    for name in ("lcl-2", "generation_only-1", "clip-1", "supervised-1", "generation_only_control-1"):
        assert (config(name).vision, config(name).optimizer) == (lcl.vision, lcl.optimizer)
        assert config(name).training.seed == int(name[-1])
    assert "loss/latent_regression" in experiment.run("generation_regression-1")["monitors"]


def test_scores_are_those_of_the_librarys_probes(experiment: Experiment) -> None:
    """The trained encoder as ``tools/probe.py`` reads it, and the untrained one of the same seed."""
    run = experiment.output / "runs" / "lcl-1"
    labels, images = experiment.data / "labels.csv", experiment.data / "images"
    reports = probe_checkpoint(run / "checkpoints", labels, images, ("probe_train", "held_out"))
    for report, name in zip(reports, ("lcl-1", "untrained-1"), strict=True):
        assert report.linear.value == experiment.run(name)["linear"]
        assert report.knn.value == experiment.run(name)["knn"]
        assert report.linear.num_examples == experiment.run(name)["test_images"] == IMAGES["held_out"]


def test_labels_teach_the_supervised_encoder(experiment: Experiment) -> None:
    """Colours are learned within 20 steps; without labels the loss stays at ln 3."""
    for seed in (1, 2):
        assert experiment.run(f"supervised-{seed}")["label_loss"] < 0.5 * math.log(3)
        assert experiment.run(f"supervised-{seed}")["linear"] > 0.9


def test_the_report_stands_alone_and_shows_every_method(experiment: Experiment) -> None:
    page = read_page(experiment.output / "report.html")
    assert_harmless(page)
    tables = page.all("table")
    assert len(tables) == 3
    for table, count in zip(tables, (7, 2, 9), strict=True):
        assert len(table.all("tr")) == count + 1
    text = page.text
    result = experiment.results
    for name in ("lcl", "clip", "untrained", "supervised"):
        assert f"{result['linear'][name]['mean']:.1%}" in text
    assert "run.py --data" in text
    assert "images_seen = 480" in text
    drawings = [image.attributes["alt"] for image in page.all("img")]
    titles = {f"Text loss, {group}" for group in ("main documents", "images before sentences", "control documents")}
    assert titles | {"Background similarity", "Effective rank of pooled features"} <= set(drawings)
    assert all(image.attributes["src"].startswith("data:image/svg+xml;base64,") for image in page.all("img"))


def test_started_again_it_only_writes_a_report_and_refuses_other_settings(experiment: Experiment) -> None:
    runs = experiment.output / "runs"
    before = {path: path.stat().st_mtime_ns for path in sorted(runs.rglob("*"))}
    result = experiment.results
    (experiment.output / "report.html").unlink()
    again = experiment.command()
    assert again.returncode == 0, again.stderr
    assert "18 runs, 18 of them complete already" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in sorted(runs.rglob("*"))} == before
    assert json.loads(again.stdout.splitlines()[-1]) == result
    assert (experiment.output / "report.html").is_file()

    some = experiment.command(methods="clip")
    assert some.returncode == 0, some.stderr
    part = json.loads(some.stdout.splitlines()[-1])
    assert part["linear"] == {"clip": result["linear"]["clip"]}
    assert part["control"]["linear"] == {}
    assert len(read_page(experiment.output / "report.html").all("table")) == 2

    other = experiment.preset.with_name("other.toml")
    other.write_text(PRESET.replace("lr = 5e-3", "lr = 4e-3"))
    refused = experiment.command(preset=str(other))
    assert refused.returncode == 1
    assert "lcl-1 holds a run with other settings" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in sorted(runs.rglob("*"))} == before


def test_a_run_that_another_process_works_on_is_left_alone(experiment: Experiment, tmp_path: Path) -> None:
    folder = tmp_path / "lcl-1"
    folder.mkdir()
    shutil.copy(experiment.output / "runs" / "lcl-1" / "job.json", folder)
    code = "import pathlib, sys; from one_run import complete; complete(pathlib.Path(sys.argv[1]))"
    with lock_folder(folder):
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{EXPERIMENT}"},
            capture_output=True,
            check=False,
        )
    assert done.returncode == 1
    assert f"another process is writing into {folder}" in (folder / "output.txt").read_text()
    assert not (folder / "result.json").exists()
