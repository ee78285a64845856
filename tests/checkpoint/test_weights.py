"""Weights apart from training. Oracles: the whole tensors put together from the ranks that saved; the model's own
parameters; files that were damaged or made to do harm on purpose.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.export import export_weights
from lcl_megatron.checkpoint.folders import Progress
from lcl_megatron.checkpoint.manifest import (
    MANIFEST_FILE,
    CheckpointError,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    file_sha256,
)
from lcl_megatron.checkpoint.parameters import parameter_shapes
from lcl_megatron.checkpoint.reader import CheckpointReader
from lcl_megatron.checkpoint.weights import ModelWeights, check_parameters, read_weights, write_weights
from lcl_megatron.config import ConfigError, LanguageConfig, RunConfig
from lcl_megatron.model.lcl import LCLModel
from tests.checkpoint import runs
from tests.checkpoint.random_weights import random_weights, tiny_config
from tests.checkpoint.runs import CONFIG, Layout
from tests.distributed import run_distributed
from tests.harm import Harm, zipped

ROOT = Path(__file__).parents[2]
ONE = Layout("one")
TP2_PP2 = Layout("tp2 x pp2", tp=2, sequence_parallel=True, cuts=("language.1",))
BF16 = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, precision="bf16"))
UNTIED = dataclasses.replace(
    CONFIG,
    vision=dataclasses.replace(CONFIG.vision, class_token=False, layer_scale_init=None),
    language=dataclasses.replace(CONFIG.language, tie_embeddings=False, context_bias=False),
)
PROGRESS = Progress(step=2, consumed_rows=8, consumed_images=10, data={"corpus 0": "abc"})
FUSED = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm",
}


def _train_and_save(rank: int, world_size: int, config: RunConfig, folder: Path) -> tuple[Any, dict[str, Any]]:
    trainable = runs.build(config)
    runs.train(trainable, range(2))
    native.save(folder, trainable, PROGRESS, b"the tokenizer")
    model: LCLModel = trainable.engine.model
    return runs.held_state(trainable), {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Folder, whole tensors by kind and name, and the first rank's parameter shapes; trained and saved once."""
    known: dict[str, Any] = {}

    def get(name: str, layout: Layout, config: RunConfig) -> Any:
        if name not in known:
            folder = tmp_path_factory.mktemp("saved")
            ranks = run_distributed(_train_and_save, layout.world_size, layout.apply(config), folder)
            known[name] = folder, runs.whole_state([state for state, _ in ranks]), ranks[0][1]
        return known[name]

    return get


@pytest.fixture
def checkpoint(saved: Callable[..., Any], tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be damaged."""
    folder, _, _ = saved("one", ONE, CONFIG)
    return Path(shutil.copytree(folder / "step-00000002", tmp_path / "step-00000002"))


@pytest.mark.parametrize(("name", "config"), [("one", CONFIG), ("untied", UNTIED)])
def test_names_and_shapes_are_those_of_the_model(name: str, config: RunConfig, saved: Callable[..., Any]) -> None:
    _, _, shapes = saved(name, ONE, config)
    assert parameter_shapes(config) == shapes


@pytest.mark.parametrize(
    ("name", "layout", "config"),
    [("one", ONE, CONFIG), ("untied", ONE, UNTIED), ("bf16", ONE, BF16), ("tp2 x pp2, bf16", TP2_PP2, BF16)],
)
def test_checkpoint_of_any_layout_gives_the_whole_tensors_in_float32(
    name: str, layout: Layout, config: RunConfig, saved: Callable[..., Any]
) -> None:
    folder, whole, _ = saved(name, layout, config)
    weights = read_weights(folder)
    assert weights.config == layout.apply(config)
    assert weights.progress == PROGRESS
    assert weights.tokenizer == b"the tokenizer"
    assert weights.state.keys() == parameter_shapes(config).keys()
    for key, tensor in weights.state.items():
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), whole[f"param/{key}"], err_msg=key)
        rounded = tensor if config is not BF16 or key == "logit_scale" else tensor.bfloat16().float()
        np.testing.assert_array_equal(rounded.numpy(), whole[f"weight/{key}"], err_msg=key)


def test_weights_folder_keeps_every_bit(tmp_path: Path) -> None:
    weights = random_weights(tiny_config(), tokenizer=b"\x00tokenizer", dtype=torch.bfloat16)
    folder = tmp_path / "not" / "there" / "yet"
    write_weights(weights, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "progress.json",
        "run.toml",
        "tokenizer.model",
    ]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["yet"]
    again = read_weights(folder)
    assert (again.config, again.tokenizer, again.progress) == (weights.config, weights.tokenizer, weights.progress)
    assert again.state.keys() == weights.state.keys()
    for name, tensor in weights.state.items():
        assert again.state[name].dtype == tensor.dtype
        assert torch.equal(again.state[name], tensor)


def test_weights_may_have_neither_tokenizer_nor_run(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    write_weights(ModelWeights(weights.config, weights.state), tmp_path / "plain")
    again = read_weights(tmp_path / "plain")
    assert again.tokenizer is None
    assert again.progress is None


def test_checkpoint_becomes_a_weights_folder(saved: Callable[..., Any], tmp_path: Path) -> None:
    folder, _, _ = saved("one", ONE, CONFIG)
    weights = read_weights(folder / "step-00000002")
    write_weights(weights, tmp_path / "weights")
    again = read_weights(tmp_path / "weights")
    assert all(torch.equal(again.state[name], tensor) for name, tensor in weights.state.items())
    assert again.progress == PROGRESS


def test_writing_never_replaces_and_clears_what_a_killed_writer_left(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    (tmp_path / ".staging-weights").mkdir()
    (tmp_path / ".staging-weights" / "rest").write_text("of a killed writer")
    write_weights(weights, tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert not (tmp_path / "weights" / "rest").exists()
    with pytest.raises(CheckpointError, match="weights exists; weights are never written over others: name another"):
        write_weights(weights, tmp_path / "weights")


def test_weights_that_do_not_fit_the_configuration_are_refused_by_name() -> None:
    weights = random_weights(tiny_config())
    state = weights.state | {"pool.query": torch.zeros(3), "extra": torch.zeros(1)}
    del state["vision.embedding.class_token"]
    with pytest.raises(CheckpointError) as caught:
        ModelWeights(weights.config, state)
    message = str(caught.value)
    assert "the weights are not those of the configured model" in message
    assert "extra: (1,), expected none of this name" in message
    assert "pool.query: (3,), expected (16,)" in message
    assert "vision.embedding.class_token: absent, expected (16,)" in message
    assert "compare the sections vision, pool and language" in message
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        check_parameters({}, weights.config, ["language"])
    with pytest.raises(CheckpointError, match="there are no weights at all; expected parameters of vision, pool"):
        ModelWeights(weights.config, {})
    with pytest.raises(ConfigError, match=r"language.vocab_size is not set"):
        parameter_shapes(tiny_config(language={"vocab_size": 0}))


def test_parts_of_a_model_are_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    state = {name: tensor for name, tensor in weights.state.items() if name.startswith(("vision.", "logit_scale"))}
    # What is not there need not be configured.
    config = dataclasses.replace(weights.config, language=LanguageConfig())
    parts = ModelWeights(config, state)
    assert parts.parts == ("vision", "logit_scale")
    write_weights(parts, tmp_path / "parts")
    assert read_weights(tmp_path / "parts").state.keys() == state.keys()
    parts.require("vision")
    with pytest.raises(CheckpointError, match="the weights hold vision, logit_scale only, and not pool; weights of an"):
        parts.require("vision", "pool")
    with pytest.raises(CheckpointError, match="and not pool, language; weights of another library's encoder"):
        export_weights(parts, tmp_path / "export")
    del state["vision.final_layernorm.bias"]
    with pytest.raises(CheckpointError, match=r"vision\.final_layernorm\.bias: absent, expected \(16,\)"):
        ModelWeights(config, state)


def test_folders_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a folder of weights .* nor a training checkpoint: expected"):
        read_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: .*; export or import it again"):
        read_weights(tmp_path)


def test_damaged_weights_folder_names_its_file(tmp_path: Path) -> None:
    write_weights(random_weights(tiny_config()), tmp_path / "w")
    (tmp_path / "w" / "progress.json").write_text('{"steps": 3}')
    with pytest.raises(CheckpointError, match=r"progress.json does not hold the progress of a run"):
        read_weights(tmp_path / "w")
    for name in ("run.toml", "progress.json"):
        (tmp_path / "w" / name).unlink()
    # An export is such a folder.
    with pytest.raises(CheckpointError, match=r"has no run\.toml; .*by tools/convert_checkpoint\.py import FOLDER"):
        read_weights(tmp_path / "w")


def test_configuration_of_another_model_is_refused(checkpoint: Path) -> None:
    text = (checkpoint / "run.toml").read_text().replace("class_token = true", "class_token = false")
    (checkpoint / "run.toml").write_text(text)
    _manifest_of_what_is_there(checkpoint)
    with pytest.raises(
        CheckpointError, match=r"(?s)step-00000002: .*position_embeddings: \(5, 16\), expected \(4, 16\)"
    ):
        read_weights(checkpoint)


def _manifest_of_what_is_there(checkpoint: Path) -> None:
    """Make the manifest fit the files, as somebody could who may write them."""
    names = (path.name for path in checkpoint.iterdir() if path.name != MANIFEST_FILE)
    files = {name: FileEntry((checkpoint / name).stat().st_size, file_sha256(checkpoint / name)) for name in names}
    (checkpoint / MANIFEST_FILE).write_text(Manifest(2, "forged", files).text())


@pytest.mark.parametrize("name", ["pool-weights-00000.safetensors", "index.json", "state.json", "run.toml"])
@pytest.mark.parametrize("has_manifest", [False, True])
def test_nothing_that_a_checkpoint_holds_is_run(
    name: str, has_manifest: bool, checkpoint: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "harm"
    for content in (pickle.dumps(Harm(mark)), zipped(Harm(mark))):
        (checkpoint / name).write_bytes(content)
        if has_manifest:
            _manifest_of_what_is_there(checkpoint)
        with pytest.raises((CheckpointError, ConfigError)):
            read_weights(checkpoint)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Harm(mark)))
    assert mark.exists(), "the files above would have done no harm anyway"


def test_damaged_checkpoint_is_named_with_what_to_do(checkpoint: Path) -> None:
    file = checkpoint / "vision-weights-00000.safetensors"
    content = file.read_bytes()
    changed = bytearray(content)
    changed[-7] ^= 1
    for damage, message in [
        (
            bytes(changed),
            "vision-weights-00000.safetensors was changed after it was written; no checkpoint .* whole: copy it again",
        ),
        (content[:1000], "vision-weights-00000.safetensors holds 1000 bytes instead of"),
    ]:
        file.write_bytes(damage)
        with pytest.raises(DamagedCheckpointError, match=message):
            read_weights(checkpoint)
    file.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"vision-weights-00000.safetensors cannot be read: No such file"):
        read_weights(checkpoint)


def test_of_several_checkpoints_the_newest_whole_one_is_read(
    saved: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, whole, _ = saved("one", ONE, CONFIG)
    older = Path(shutil.copytree(folder / "step-00000002", tmp_path / "step-00000002"))
    newer = Path(shutil.copytree(older, tmp_path / "step-00000003"))
    weights = read_weights(tmp_path)
    np.testing.assert_array_equal(weights.state["pool.query"].numpy(), whole["param/pool.query"])
    # A manifest of another step, and then none.
    assert "step-00000003/manifest.json belongs to step 2" in caplog.text
    (older / MANIFEST_FILE).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{older} has no manifest.json.*take another"):
        read_weights(tmp_path)
    assert newer.exists()


@pytest.mark.parametrize("parts", [("vision",), ("vision", "pool")])
def test_parts_of_the_model_are_read_without_the_files_of_the_others(
    parts: tuple[str, ...], saved: Callable[..., Any], tmp_path: Path
) -> None:
    folder, whole, _ = saved("tp2 x pp2, bf16", TP2_PP2, BF16)
    checkpoint = Path(shutil.copytree(folder / "step-00000002", tmp_path / "step-00000002"))
    for file in checkpoint.glob("*.safetensors"):
        if not any(file.name.startswith(f"{part}-weights-") for part in parts):
            file.unlink()
    weights = read_weights(checkpoint, parts)
    assert weights.parts == parts
    for key, tensor in weights.state.items():
        np.testing.assert_array_equal(tensor.numpy(), whole[f"param/{key}"], err_msg=key)
    with pytest.raises(DamagedCheckpointError, match=r"weights-\d+.safetensors cannot be read"):
        read_weights(checkpoint)


def test_reader_names_tensors_that_are_not_there(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tensor pool\.nothing"):
        CheckpointReader(checkpoint).read(["pool.query", "pool.nothing"])


WITHOUT_MEGATRON = """
import sys
sys.modules["megatron"] = None
from pathlib import Path
from lcl_megatron.checkpoint.commands import COMMANDS
from lcl_megatron.checkpoint.convert import clip_vision, export_targets, official, opt, table, timm_vit, whole_model
from lcl_megatron.checkpoint.stock_libraries import LibraryError
from lcl_megatron.checkpoint.weights import read_weights, write_weights
source, output = map(Path, sys.argv[1:])
write_weights(read_weights(source), output / "weights")
print(COMMANDS["export"](source, output / "export").text.splitlines()[-1])
try:
    COMMANDS["export"](source, output / "verified", verify=True)
except LibraryError as error:
    print(error)
assert "transformers" not in sys.modules
"""


def test_reading_and_exporting_work_without_megatron_core(saved: Callable[..., Any], tmp_path: Path) -> None:
    """--verify does not, and says so."""
    pytest.importorskip("huggingface_hub", reason="writes the model card")
    folder, _, _ = saved("tp2 x pp2, bf16", TP2_PP2, BF16)
    checkpoint = Path(shutil.copytree(folder / "step-00000002", tmp_path / "step-00000002"))
    # The runs of these tests have no real tokenizer.
    (checkpoint / "tokenizer.model").unlink()
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEGATRON, str(checkpoint), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert '"round_trip": 0.0' in lines[0]
    assert "--verify compares with the model's own outputs and needs megatron" in lines[1]
    assert "install megatron-core, or leave --verify out" in lines[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weights = random_weights(tiny_config())
    weights.state["pool.query"][3] = value
    with pytest.raises(CheckpointError, match=r"1 of \d+ parameters .* not finite, e\.g\. pool\.query: the run had"):
        dataclasses.replace(weights)
