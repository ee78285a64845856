"""The parts of the experiment on the collapse of the encoder: presets, data, runs as processes, intervals.

Oracles: intervals from tables of Student's and the normal distribution; processes as the operating system lists them;
messages of errors.
"""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lcl_megatron.config import ConfigError
from tests.examples.collapse_runs import EXPERIMENT, PRESET, ROOT, make_data

MODULES = ("dataset", "jobs", "methods", "one_run", "planning", "report", "settings", "summary", "supervised")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a function that imports a module of the experiment; they lie beside their script and are no package."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_run_that_fails_is_named_with_its_reason_and_output(module: Any, tmp_path: Path) -> None:
    jobs = module("jobs")
    job = jobs.Job("lcl", 1, "pretrain", "", "labels.csv", "images", ("a.zip",), "test", 8)
    with pytest.raises(jobs.RunFailedError, match=r"lcl-1 failed: .*[Dd]irectory.*; see .*lcl-1/output.txt"):
        jobs.run_jobs([job], tmp_path, 1, os.remove, say=lambda line: None)
    assert jobs.Job.from_json((tmp_path / "lcl-1" / "job.json").read_text()) == job


def test_runs_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    """Killed without a chance to clean up, the command leaves no process that would go on writing."""
    (tmp_path / "sleeper.py").write_text(
        "import os, time\n"
        "def sleep(folder):\n"
        "    (folder / 'pid.tmp').write_text(str(os.getpid()))\n"
        "    (folder / 'pid.tmp').rename(folder / 'pid')\n"
        "    time.sleep(3600)\n"
    )
    (tmp_path / "command.py").write_text(
        "from pathlib import Path\n"
        "from jobs import Job, run_jobs\n"
        "from sleeper import sleep\n"
        "if __name__ == '__main__':\n"
        "    job = Job('lcl', 1, 'pretrain', '', '', '', (), 'test', 8)\n"
        "    run_jobs([job], Path('runs'), 1, sleep)\n"
    )
    path = os.pathsep.join(map(str, (ROOT, EXPERIMENT, tmp_path)))
    command = subprocess.Popen(
        [sys.executable, "command.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL
    )
    worker = tmp_path / "runs" / "lcl-1" / "pid"
    wait_until(worker.exists)
    pid = int(worker.read_text())
    assert is_alive(pid)
    command.kill()
    command.wait()
    wait_until(lambda: not is_alive(pid))


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition holds; a condition that never does is a failure."""
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited two minutes in vain")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_intervals_are_those_of_the_tables(module: Any) -> None:
    """Student's t with 2 degrees of freedom is 4.302653, the normal quantile 1.959964."""
    estimate = module("summary").estimate
    over_seeds = estimate([0.5, 0.6, 0.7])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert (over_seeds.mean, over_seeds.low, over_seeds.high) == pytest.approx((0.6, 0.6 - half, 0.6 + half), abs=1e-6)
    both = estimate([0.5, 0.6, 0.7], num_images=400)
    wider = math.hypot(half, 1.959964 * math.sqrt(0.6 * 0.4 / 400))
    assert (both.low, both.high) == pytest.approx((0.6 - wider, 0.6 + wider), abs=1e-6)
    certain = estimate([1.0, 1.0, 1.0], num_images=400)
    assert (certain.low, certain.high) == (1.0, 1.0)
    assert estimate([0.9, 0.99], num_images=400).high == 1.0
    with pytest.raises(ValueError, match="1 values; an interval over seeds needs at least 2"):
        estimate([0.5])


def test_a_run_that_saw_other_images_is_refused(module: Any, tmp_path: Path) -> None:
    jobs, summary, settings = module("jobs"), module("summary"), module("settings")
    experiment = settings.ExperimentConfig(
        images_seen=1000,
        pairs_images_seen=3000,
        images_per_step=50,
        seeds=(1, 2),
        documents="a",
        control_documents="b",
        vocab_size=300,
    )
    for method, expected in (("lcl", 1000), ("generation_only_control", 1000), ("generation_only_pairs", 3000)):
        job = jobs.Job(method, 1, "pretrain", "", "", "", (), "test", 8)
        run = jobs.Finished(job, tmp_path, {"images_seen": 700, "steps": 9})
        with pytest.raises(ValueError, match=f"saw 700 images, the experiment is about {expected} for every method"):
            summary.summarize([run], experiment)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("images_seen = 480", ""), r"\[experiment\] lacks images_seen and has unknown fields none"),
        (("images_seen", "images_saen"), r"lacks images_seen and has unknown fields images_saen"),
        (
            ("images_seen = 480", "images_seen = 2.5"),
            r"experiment.images_seen = 2.5 is of type float; expected a whole number",
        ),
        (("images_seen = 480", "images_seen = 4"), r"experiment.images_per_step = 24; expected 1 to 4, the images of"),
        (("[1, 2]", "[1, 1]"), r"experiment.seeds = \[1, 1\]; at least two different seeds"),
        (("[1, 2]", '["a"]'), r"experiment.seeds\[0\] = 'a' is of type str; expected a whole number"),
        (("num_layers = 1", "num_layer = 1"), r"unknown field 'vision.num_layer'"),
        (("[pool]", "[pool"), r"mine.toml: not valid TOML"),
    ],
)
def test_a_wrong_preset_is_refused(module: Any, tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PRESET.replace(*change, 1))
    with pytest.raises(ConfigError, match=message):
        module("settings").read_preset(str(path))


def test_shipped_presets_are_read_and_an_unknown_one_lists_them(module: Any) -> None:
    settings = module("settings")
    for name in ("small", "photos", "full"):
        preset = settings.read_preset(name)
        assert preset.run_config().vision.image_size == 32
        assert len(preset.experiment.seeds) == 3
    with pytest.raises(ConfigError, match=r"--preset tiny: there is no file .*; known: full, photos, small"):
        settings.read_preset("tiny")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["lcl", "lpl"], "--methods lpl: unknown; known are lcl, contrast_only, "),
        (
            ["generation_only_pairs"],
            "--methods generation_only_pairs: the main table is empty; add one that is no control",
        ),
    ],
)
def test_methods_that_cannot_be_run_are_refused(module: Any, tmp_path: Path, methods: list[str], message: str) -> None:
    planning, preset = module("planning"), module("settings").read_preset("small")
    with pytest.raises(ConfigError, match=message):
        planning.plan_jobs(preset, None, tmp_path, methods)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("docs/untold/data/docs_shard_0_v2.jsonl.zip", r"has no documents of style 'untold': looked for"),
        ("labels.csv", r"there is no labels.csv in .*told or .*paint; expected image_name, split, label"),
    ],
)
def test_data_that_is_incomplete_is_refused(module: Any, tmp_path: Path, remove: str, message: str) -> None:
    make_data(tmp_path / "paint")
    (tmp_path / "paint" / remove).unlink()
    with pytest.raises(ConfigError, match=message):
        module("dataset").open_data(str(tmp_path / "paint"), tmp_path / "out", ("told", "untold"), 320)


def test_images_may_be_packed_and_splits_must_be_three(module: Any, tmp_path: Path) -> None:
    data = tmp_path / "paint"
    make_data(data)
    subprocess.run(["tar", "cJf", "images.tar.xz", "images"], cwd=data, check=True)
    (data / "images").rename(tmp_path / "elsewhere")
    styles = ("told", "untold")
    found = module("dataset").open_data(str(data), tmp_path / "out", ("docs/told", "untold"), 320)
    assert found.main.shards == tuple((data / "docs" / "told" / "data").iterdir())
    assert found.main.images == found.control.images == tmp_path / "out" / "data" / "images"
    assert sorted(path.name for path in found.main.images.iterdir()) == sorted(os.listdir(tmp_path / "elsewhere"))
    assert found.test_split == "held_out"
    assert [path.is_dir() for path in found.corpora.values()] == [True, True]

    (data / "images.tar.xz").unlink()
    with pytest.raises(ConfigError, match=r"paint has neither images/ nor images.tar.xz"):
        module("dataset").open_data(str(data), tmp_path / "other", styles, 320)
    (tmp_path / "elsewhere").rename(data / "images")
    labels = (data / "labels.csv").read_text()
    (data / "labels.csv").write_text(labels.replace("held_out_1.png,held_out", "held_out_1.png,spare"))
    with pytest.raises(ConfigError, match=r"splits \['held_out', 'pretrain', 'probe_train', 'spare'\]; expected"):
        module("dataset").open_data(str(data), tmp_path / "out", styles, 320)
    with pytest.raises(ConfigError, match="documents = 'mixed': digits come in the styles redundant, descriptive"):
        module("dataset").open_data("digits", tmp_path / "digits", ("mixed", "redundant"), 320)
