"""A checkpoint of any layout in any other. Oracle: the whole tensors of weights and of optimizer state, put together
from the ranks that saved; they must be the same bits on the ranks that loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcl_megatron.checkpoint import native
from lcl_megatron.checkpoint.folders import Progress, step_folder
from lcl_megatron.config import RunConfig
from tests.checkpoint import runs
from tests.checkpoint.runs import CONFIG, HeldState, Layout
from tests.distributed import run_distributed

ONE = Layout("one")
DP2 = Layout("dp2", dp=2)
TP2 = Layout("tp2", tp=2)
PP2_VISION = Layout("pp2 in the ViT", cuts=("vision.1",))
PP2_EMBED = Layout("pp2 at the token embedding", cuts=("language.embed",))
DP2_TP2 = Layout("dp2 x tp2, sequence parallel", dp=2, tp=2, sequence_parallel=True)
CP2 = Layout("cp2", cp=2)
CP2_TP2 = Layout("cp2 x tp2, sequence parallel", cp=2, tp=2, sequence_parallel=True)
CP2_PLAIN = Layout("cp2, whole optimizer", cp=2, distributed_optimizer=False)
PP3 = Layout("pp3", cuts=("vision.1", "language.1"))
PP2X2 = Layout("pp2 x 2 stages", cuts=("vision.1", "language.embed", "language.1"), stages_per_rank=2)
# Token embedding and heads are on one rank.
DP2_PP2X2 = Layout("dp2 x pp2 x 2 stages", dp=2, cuts=("pool", "language.embed", "heads"), stages_per_rank=2)
PP2X2_PLAIN = dataclasses.replace(PP2X2, name="pp2 x 2 stages, whole optimizer", distributed_optimizer=False)
ONE_PLAIN = Layout("one, whole optimizer", distributed_optimizer=False)
DP2_PLAIN = Layout("dp2, whole optimizer", dp=2, distributed_optimizer=False)
PP2_PLAIN = Layout("pp2, whole optimizer", cuts=("heads",), distributed_optimizer=False)

UNTIED = dataclasses.replace(CONFIG, language=dataclasses.replace(CONFIG.language, tie_embeddings=False))
BF16 = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, precision="bf16"))
MODELS = {"tied": CONFIG, "untied": UNTIED, "bf16": BF16}

CROSSINGS = [
    ("tied", ONE, TP2),
    ("tied", ONE, DP2_PLAIN),
    ("tied", PP2_VISION, DP2),
    ("tied", DP2_TP2, PP3),
    ("tied", DP2_TP2, ONE),
    ("tied", PP3, TP2),
    ("tied", DP2_PLAIN, PP2_EMBED),
    ("tied", PP2X2, ONE),
    ("tied", DP2_PP2X2, PP2X2_PLAIN),
    ("tied", DP2_TP2, DP2_PP2X2),
    ("untied", PP2_EMBED, DP2_TP2),
    ("untied", DP2_TP2, PP2_PLAIN),
    ("bf16", DP2_TP2, PP2_PLAIN),
    ("bf16", ONE_PLAIN, DP2),
    ("bf16", PP3, ONE),
    ("tied", CP2, PP2_VISION),
    ("tied", DP2_PLAIN, CP2_TP2),
    ("bf16", CP2_PLAIN, CP2),
    ("bf16", PP3, DP2_PP2X2),
    ("bf16", DP2_PP2X2, PP2_PLAIN),
]
PROGRESS = Progress(step=2, consumed_rows=8, consumed_images=10, data={"corpus 0": "abc"})


def _train_and_save(rank: int, world_size: int, config: RunConfig, folder: Path) -> HeldState:
    trainable = runs.build(config)
    runs.train(trainable, range(2))
    native.save(folder, trainable, PROGRESS, b"")
    return runs.held_state(trainable)


def _load(rank: int, world_size: int, config: RunConfig, folder: Path) -> tuple[HeldState, Progress]:
    # Other initial weights than the run that saved: what is not loaded shows.
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, seed=99))
    trainable = runs.build(config)
    progress = native.load(step_folder(folder, 2), trainable)
    return runs.held_state(trainable), progress


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Train and save a model in a layout, once."""
    known: dict[tuple[str, Layout], tuple[Path, list[HeldState]]] = {}

    def get(model: str, layout: Layout) -> tuple[Path, list[HeldState]]:
        if (model, layout) not in known:
            folder = tmp_path_factory.mktemp("saved")
            ranks = run_distributed(_train_and_save, layout.world_size, layout.apply(MODELS[model]), folder)
            known[model, layout] = folder, ranks
        return known[model, layout]

    return get


@pytest.mark.parametrize(
    ("model", "source", "target"), CROSSINGS, ids=[f"{m}: {s.name} -> {t.name}" for m, s, t in CROSSINGS]
)
def test_loaded_tensors_equal_saved_ones(
    model: str,
    source: Layout,
    target: Layout,
    saved: Callable[..., Any],
) -> None:
    folder, before = saved(model, source)
    loaded = run_distributed(_load, target.world_size, target.apply(MODELS[model]), folder)
    after = [rank for rank, _ in loaded]
    runs.assert_same_bits(runs.whole_state(after), runs.whole_state(before))
    for rank, progress in loaded:
        assert progress == PROGRESS
        assert rank.adam_steps == before[0].adam_steps == [2]
        assert rank.counters_are_separate
        assert rank.learning_rate == before[0].learning_rate


def test_saved_state_is_worth_loading(saved: Callable[..., Any]) -> None:
    """The comparisons above would hold for zeros too."""
    _, ranks = saved("tied", ONE)
    state = runs.whole_state(ranks)
    for name, values in state.items():
        assert (values != 0).any() or name.endswith(("key_projection.bias", "key_layernorm.bias")), name
    assert sum(name.startswith("exp_avg_sq/") for name in state) == sum(name.startswith("weight/") for name in state)


def test_bf16_checkpoint_keeps_float32_values(saved: Callable[..., Any]) -> None:
    _, ranks = saved("bf16", PP3)
    state = runs.whole_state(ranks)
    name = "language.layers.0.mlp.linear_fc1.weight"
    difference = abs(state[f"param/{name}"] - state[f"weight/{name}"])
    assert 0 < difference.max() <= 2**-8 * abs(state[f"param/{name}"]).max()


@pytest.mark.parametrize("source", [ONE, DP2_PLAIN], ids=lambda layout: layout.name)
@pytest.mark.parametrize("target", [DP2, DP2_PLAIN, DP2_PP2X2], ids=lambda layout: layout.name)
def test_replicas_of_a_run_that_goes_on_in_float32_hold_the_same(
    source: Layout, target: Layout, saved: Callable[..., Any]
) -> None:
    """The float32 values, on all ranks: not rounded ones wherever the rank's optimizer holds no others."""
    folder, before = saved("bf16", source)
    after = [rank for rank, _ in run_distributed(_load, target.world_size, target.apply(CONFIG), folder)]
    expected, found = runs.whole_state(before), runs.whole_state(after)
    for name, values in expected.items():
        values = expected[name.replace("weight/", "param/", 1)] if name.startswith("weight/") else values
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_run_that_goes_on_in_bf16_rounds_the_float32_values(saved: Callable[..., Any]) -> None:
    folder, before = saved("tied", DP2_PLAIN)
    expected = runs.whole_state(before)
    found = runs.whole_state([rank for rank, _ in run_distributed(_load, 2, DP2.apply(BF16), folder)])
    for name, values in expected.items():
        rounded = torch.from_numpy(values).bfloat16().float().numpy()
        is_rounded = name.startswith("weight/") and name != "weight/logit_scale"
        np.testing.assert_array_equal(found[name], rounded if is_rounded else values, err_msg=name)
