"""Writing, finding and refusing checkpoints. Oracles: the files on disk; the bits that were in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.folders import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    Progress,
    complete_checkpoints,
    read_config,
    step_folder,
    step_of,
)
from lcl_megatron.checkpoint.manifest import CheckpointError, read_manifest
from lcl_megatron.checkpoint.reader import CheckpointReader
from lcl_megatron.checkpoint.saver import remove_remains
from lcl_megatron.config import RunConfig
from lcl_megatron.config.sources import load_run_config
from lcl_megatron.parallel import engine as engines
from tests.checkpoint import runs
from tests.checkpoint.runs import CONFIG, Layout
from tests.distributed import run_distributed

ONE = Layout("one").apply(CONFIG)


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _save_steps(rank: int, world_size: int, config: RunConfig, root: Path, steps: range) -> None:
    trainable = runs.build(config)
    for step in steps:
        native.save(root, trainable, Progress(step=step, consumed_rows=4 * step), b"the tokenizer")
        runs.train(trainable, range(step, step + 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 0, 1 and 2."""
    root = tmp_path_factory.mktemp("runs") / "not" / "there" / "yet"
    run_distributed(_save_steps, 1, ONE, root, range(3))
    return root


def test_checkpoint_holds_configuration_and_tokenizer_and_nothing_is_left_beside_it(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == [f"step-{step:08d}" for step in range(3)]
    checkpoint = step_folder(saved, 1)
    assert (checkpoint / TOKENIZER_FILE).read_bytes() == b"the tokenizer"
    assert read_config(checkpoint) == ONE
    assert load_run_config(["--config", str(checkpoint / CONFIG_FILE)]) == ONE


def test_latest_is_the_highest_complete_step(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "absent") == []
    assert complete_checkpoints(tmp_path) == []
    for name in ("step-00000009", "step-00000010", "step-100000000", ".staging-step-200000000", "step-x", "step-12"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-300000000").write_text("a file, not a folder")
    assert complete_checkpoints(tmp_path)[0] == tmp_path / "step-100000000"


def test_latest_of_a_checkpoint_is_itself(saved: Path) -> None:
    assert complete_checkpoints(saved)[0] == saved / "step-00000002"
    assert complete_checkpoints(str(saved / "step-00000001"))[0] == saved / "step-00000001"


def test_step_of_is_the_inverse_of_step_folder() -> None:
    assert step_of(step_folder("runs", 123_456_789)) == 123_456_789
    with pytest.raises(CheckpointError, match=r"runs/best is not called step-NNNNNNNN"):
        step_of(Path("runs/best"))


def _save_over_leftovers(rank: int, world_size: int, root: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    trainable = runs.build(ONE)
    progress = Progress(step=7)
    with pytest.raises(TypeError):
        # Dies when the folder is there and its files are not.
        native.save(root, trainable, progress, None)  # type: ignore[arg-type]
    (staging,) = root.iterdir()
    assert staging.name.startswith(".staging-step-00000007-")
    (staging / "vision-weights-00009.safetensors").write_bytes(b"of an earlier layout")
    assert complete_checkpoints(root) == []
    remove_remains(root)
    assert list(root.iterdir()) == []
    native.save(root, trainable, progress, b"")
    first = _contents(root)
    runs.train(trainable, range(1))
    assert native.save(root, trainable, progress, b"another") == step_folder(root, 7)
    return first, _contents(root)


def test_save_leaves_killed_saves_alone_and_never_writes_in_place(tmp_path: Path) -> None:
    ((first, second),) = run_distributed(_save_over_leftovers, 1, tmp_path)
    assert {name.split("/")[0] for name in first} == {"step-00000007"}
    assert second == first


def test_files_are_the_manifests_and_any_safetensors_reader_opens_them(saved: Path) -> None:
    checkpoint = saved / "step-00000001"
    manifest = read_manifest(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {"manifest.json", *manifest.files}
    for name, entry in manifest.files.items():
        content = (checkpoint / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.size, entry.sha256)
    reader = CheckpointReader(checkpoint)
    tensors = load_file(checkpoint / "vision-weights-00000.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"vision", "optimizer"}
    for name, tensor in tensors.items():
        if "#" not in name:
            assert torch.equal(reader.read([name])[name], tensor)


def _load_again(rank: int, world_size: int, config: RunConfig, root: Path) -> Any:
    trainable = runs.build(config)
    runs.train(trainable, range(3))
    progress = Progress(step=3, consumed_rows=12, consumed_images=5, data={"corpus 0": "x", "training.seed": "1"})
    native.save(root, trainable, progress, b"")
    before = runs.held_state(trainable), trainable.scheduler.state_dict()
    other = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=5))
    again = runs.build_again(other, trainable)
    fresh = runs.held_state(again)
    assert native.load(step_folder(root, 3), again) == progress
    return before, (runs.held_state(again), again.scheduler.state_dict()), fresh


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        (Layout("one"), "fp32"),
        (Layout("one, whole optimizer", distributed_optimizer=False), "bf16"),
        (Layout("dp2", dp=2), "bf16"),
        (Layout("dp2, whole optimizer", dp=2, distributed_optimizer=False), "fp32"),
        (Layout("tp2 x pp2", tp=2, sequence_parallel=True, cuts=("language.1",)), "bf16"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_same_layout_gets_back_the_same_bits(layout: Layout, precision: str, tmp_path: Path) -> None:
    config = layout.apply(CONFIG)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision))
    for (before, schedule), (after, loaded_schedule), fresh in run_distributed(
        _load_again, layout.world_size, config, tmp_path
    ):
        assert loaded_schedule == schedule
        assert schedule["num_steps"] == 3
        assert after.adam_steps == before.adam_steps == [3]
        assert after.learning_rate == before.learning_rate != fresh.learning_rate
        changed = 0
        for (name, saved_piece), (_, loaded_piece), (_, fresh_piece) in zip(
            before.pieces, after.pieces, fresh.pieces, strict=True
        ):
            np.testing.assert_array_equal(loaded_piece.values, saved_piece.values, err_msg=name)
            changed += not np.array_equal(fresh_piece.values, saved_piece.values)
        assert changed > 0.9 * len(before.pieces)


def _refused(rank: int, world_size: int, config: RunConfig, checkpoint: Path) -> list[str]:
    messages = []
    trainable = runs.build(config)
    for load in (lambda: native.load(checkpoint, trainable), lambda: native.load_model(checkpoint, trainable.engine)):
        with pytest.raises(CheckpointError) as refusal:
            load()
        messages.append(str(refusal.value))
    return messages


def test_other_architecture_is_refused_with_every_field_that_differs(saved: Path) -> None:
    config = dataclasses.replace(
        ONE,
        vision=dataclasses.replace(ONE.vision, layer_scale_init=None, drop_path_rate=0.0),
        language=dataclasses.replace(ONE.language, num_layers=1, activation="gelu"),
    )
    (messages,) = run_distributed(_refused, 1, config, saved / "step-00000002")
    for message in messages:
        first, *listed, last = message.splitlines()
        assert first.endswith("step-00000002 holds another architecture than this run:")
        assert [line.strip() for line in listed] == [
            "vision.layer_scale: True in the checkpoint, False in this run",
            "language.num_layers: 2 in the checkpoint, 1 in this run",
            "language.activation: 'relu' in the checkpoint, 'gelu' in this run",
        ]
        assert f"--config {saved / 'step-00000002' / 'run.toml'}" in last


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no run\.toml; expected a step-NNNNNNNN folder of a training run"):
        read_config(tmp_path)


def _load_model_only(rank: int, world_size: int, config: RunConfig, checkpoint: Path) -> dict[str, np.ndarray]:
    engine = engines.build_engine(config, engines.start(config))
    native.load_model(checkpoint, engine)
    return {name: parameter.detach().numpy() for name, parameter in engine.model.named_parameters()}


def test_model_alone_is_loaded_without_an_optimizer(saved: Path) -> None:
    other = dataclasses.replace(ONE, training=dataclasses.replace(ONE.training, seed=99))
    (loaded,) = run_distributed(_load_model_only, 1, other, saved / "step-00000000")
    (initial,) = run_distributed(_initial_weights, 1, ONE)
    for name, values in initial.items():
        np.testing.assert_array_equal(loaded[name], values, err_msg=name)


def _initial_weights(rank: int, world_size: int, config: RunConfig) -> dict[str, np.ndarray]:
    engine = engines.build_engine(config, engines.start(config))
    return {name: parameter.detach().numpy() for name, parameter in engine.model.named_parameters()}
