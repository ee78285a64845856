"""Engines: who encodes the shards changes no byte, and nobody outlives the run.

Oracles: byte equality with the run of one process; the process table of the system.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from tests.data.preprocess_runs import config, tree_hash, write_shards

ROOT = Path(__file__).parents[3]


@pytest.fixture
def shards(mmc4) -> list[Path]:
    return write_shards(mmc4)


@pytest.fixture
def whole(mmc4, shards, tokenizer_path, tmp_path) -> dict[str, str]:
    """What one process makes of the shards."""
    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "whole"))
    return tree_hash(tmp_path / "whole")


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(mmc4, shards, whole, tokenizer_path, tmp_path, workers):
    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus", num_workers=workers))
    assert tree_hash(tmp_path / "corpus") == whole


@pytest.mark.slow
def test_ray_changes_no_byte(mmc4, shards, whole, tokenizer_path, tmp_path):
    ray = pytest.importorskip("ray")
    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus", num_workers=2, engine="ray"))
    assert tree_hash(tmp_path / "corpus") == whole
    assert not ray.is_initialized()


@pytest.mark.slow
def test_errors_of_ray_workers_arrive_and_a_joined_cluster_is_not_left(mmc4, shards, whole, tokenizer_path, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        job = config(mmc4, shards, tokenizer_path, tmp_path / "corpus", engine="ray")
        whole_zip = shards[1].read_bytes()
        shards[1].write_bytes(b"PK\3\4 no zip file at all")
        with pytest.raises(OSError, match="docs_shard_1_v2.jsonl.zip is a damaged zip file"):
            preprocess(job)
        assert not (tmp_path / "corpus").exists()
        assert ray.is_initialized()
        shards[1].write_bytes(whole_zip)
        preprocess(job)
        assert tree_hash(tmp_path / "corpus") == whole
    finally:
        ray.shutdown()


def test_a_ray_cluster_that_is_not_there_is_a_clear_error(mmc4, shards, tokenizer_path, tmp_path):
    pytest.importorskip("ray")
    job = config(mmc4, shards, tokenizer_path, tmp_path / "corpus", engine="ray", ray_address="no cluster here")
    with pytest.raises(ConfigError, match="cannot join the Ray cluster no cluster here: .*is --ray-address right"):
        preprocess(job)


def test_ray_that_is_not_installed_is_a_clear_error(mmc4, shards, tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--engine ray needs the package ray: pip install 'lcl_megatron\[ray\]'"):
        preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus", engine="ray"))


def until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def pipe_shard(mmc4) -> Path:
    """A shard that no reader gets to the end of, so that a worker is busy until it is killed."""
    path = mmc4.path / "docs_shard_9_v2.jsonl"
    path.write_bytes(b"\n" * 300_000_000)
    return path


def start(job: PreprocessConfig) -> subprocess.Popen[str]:
    """Run preprocessing in a process of its own."""
    flags = {
        "input": [str(path) for path in job.input],
        "image_root": str(job.image_root),
        "tokenizer_model": str(job.tokenizer_model),
        "output": str(job.output),
    }
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--num-workers", str(job.num_workers)]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", *([value] if isinstance(value, str) else value)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_end_with_a_killed_parent_and_the_next_run_goes_on(mmc4, shards, whole, tokenizer_path, tmp_path):
    """The parent is killed while two workers are busy with shards of which the first never ends."""
    endless = config(mmc4, [pipe_shard(mmc4), *shards], tokenizer_path, tmp_path / "corpus", num_workers=2)
    process = start(endless)
    assert until(lambda: len(workers_of(process)) == 2)
    workers = workers_of(process)
    assert until(lambda: any((tmp_path / ".corpus.partial" / "parts").glob("000000-*.tmp")))
    process.kill()
    process.communicate()
    assert until(lambda: not any(is_alive(worker) for worker in workers), seconds=20)
    preprocess(config(mmc4, shards, tokenizer_path, tmp_path / "corpus", num_workers=2))
    assert tree_hash(tmp_path / "corpus") == whole


def test_a_killed_worker_is_an_error_that_says_what_to_do(mmc4, shards, whole, tokenizer_path, tmp_path):
    job = config(mmc4, [*shards, pipe_shard(mmc4)], tokenizer_path, tmp_path / "corpus", num_workers=2)
    process = start(job)
    assert until(lambda: any((tmp_path / ".corpus.partial" / "parts").glob("000005-*.tmp")))
    for worker in workers_of(process):
        os.kill(worker.pid, signal.SIGKILL)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "error: a worker process ended before its shard was encoded" in errors
    assert "run the same command again" in errors
    journal = json.loads((tmp_path / ".corpus.partial" / "journal.json").read_text())
    assert journal["totals"]["documents"] > 0
