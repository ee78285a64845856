"""A run through ``pretrain_lcl.py`` on two context-parallel ranks. Oracle: the same run on one process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lcl_megatron.checkpoint.folders import complete_checkpoints, read_config
from lcl_megatron.config import CheckpointConfig
from lcl_megatron.config.toml import to_toml
from tests.training.small_runs import DataFolder, plain_document, read_reports, small_config, train_and_read

ROOT = Path(__file__).parents[2]
STEPS = 5
TOLERANCE = 1e-5
"""Relative, fp32; seen over five steps: losses 6e-8, similarities of features 4e-6."""


def _pretrain_on_two(folder: Path, *flags: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, str(ROOT / "pretrain_lcl.py"), "--config", str(folder / "run.toml"), *flags],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    return output


def test_two_context_parallel_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    data = DataFolder(tmp_path / "data")
    data.write([plain_document(number) for number in range(12)])
    data.truncate("4a.png")
    data.preprocess()
    config = small_config(
        data.corpus,
        data={"seq_length": 64, "max_bad_image_rate": 1.0},
        vision={"drop_path_rate": 0.3, "layer_scale_init": 0.5},
        loss={"contrastive_loss_weight": 1.0},
        training={"train_iters": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
        # Usual Adam makes a step of full length out of the rounding noise of a gradient near zero.
        optimizer={"lr": 0.1, "adam_eps": 1.0},
        checkpoint={"save": str(tmp_path / "saved-by-one")},
        logging={"log_dir": str(tmp_path / "one")},
    )
    (tmp_path / "run.toml").write_text(to_toml(config))
    one = train_and_read(config)
    output = _pretrain_on_two(tmp_path, "--log-dir", "two", "--save", "saved-by-two", "--context-parallel-size", "2")
    assert "world size 2: tensor 1 x pipeline 1 x context 2 x data 1" in output
    assert "4a.png" in output

    two = read_reports(tmp_path / "two")
    assert [report["step"] for report in two] == list(range(1, STEPS + 1))
    clocks = ("perf/", "time")
    for single, shared in zip(one, two, strict=True):
        assert shared.keys() == single.keys()
        for name in (name for name in single if not name.startswith(clocks)):
            assert shared[name] == pytest.approx(single[name], rel=TOLERANCE, abs=1e-6), name
    losses = [report["loss/total"] for report in two]
    assert losses[-1] < 0.99 * losses[0]
    assert sum(report["data/bad_images"] for report in two) > 0

    # The checkpoint of two ranks goes on on one.
    saved = complete_checkpoints(tmp_path / "saved-by-two")[0]
    assert read_config(saved).parallel.context_parallel_size == 2
    training = dataclasses.replace(config.training, train_iters=STEPS + 1)
    after = {
        name: train_and_read(
            dataclasses.replace(
                config,
                training=training,
                checkpoint=CheckpointConfig(load=str(tmp_path / f"saved-by-{name}")),
                logging=dataclasses.replace(config.logging, log_dir=str(tmp_path / f"after-{name}")),
            )
        )
        for name in ("one", "two")
    }
    assert [report["step"] for report in after["two"]] == [STEPS + 1]
    assert after["two"][0]["loss/total"] == pytest.approx(after["one"][0]["loss/total"], rel=TOLERANCE)
