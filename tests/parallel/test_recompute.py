"""Recomputation and subset drop-path on several ranks.

Oracles: the same layout that keeps everything, bit for bit on every rank; for subsets, which depend on the images of
a micro-batch, one process with the same micro-batches.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from lcl_megatron.config import ParallelConfig, RunConfig
from tests.distributed import run_distributed
from tests.parallel import test_overlap
from tests.parallel.test_layouts import CONFIG, Layout, _check, _run, _whole_gradients


@dataclass(frozen=True)
class Saving(Layout):
    """A layout, and how it saves memory."""

    recompute: Any = "none"
    recompute_num_layers: int = 0
    drop_path_mode: Any = "mask"
    overlap: bool = False

    def config(self) -> RunConfig:
        config = super().config()
        fields: dict[str, Any] = {
            "recompute_granularity": self.recompute,
            "recompute_num_layers": self.recompute_num_layers,
        }
        return dataclasses.replace(
            config,
            vision=dataclasses.replace(config.vision, drop_path_mode=self.drop_path_mode, **fields),
            # GELU, so that its output is recomputed too.
            language=dataclasses.replace(config.language, activation="gelu", **fields),
            parallel=dataclasses.replace(config.parallel, overlap_param_gather=self.overlap),
        )


LAYOUTS = [
    Saving("tp2, sequence parallel", 4, tensor=2, sequence_parallel=True),
    Saving("tp2 x pp2, subset", 2, tensor=2, cuts=("vision.1",), drop_path_mode="subset"),
    Saving("tp2 x pp2, one layer", 2, tensor=2, sequence_parallel=True, cuts=("language.1",), recompute_num_layers=1),
    Saving("dp2 with overlap, subset", 2, data_parallel_size=2, drop_path_mode="subset", overlap=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_recomputation_changes_no_bit_on_any_rank(layout: Saving) -> None:
    keeping = run_distributed(_run, layout.world_size, dataclasses.replace(layout, recompute_num_layers=0))
    for granularity in ("selective", "full"):
        layers = layout.recompute_num_layers if granularity == "full" else 0
        saving = dataclasses.replace(layout, recompute=granularity, recompute_num_layers=layers)
        found = run_distributed(_run, layout.world_size, saving)
        for (losses, gradients, place), (expected_losses, expected, expected_place) in zip(found, keeping, strict=True):
            assert (losses, place) == (expected_losses, expected_place)
            assert gradients.keys() == expected.keys()
            for name, (gradient, _) in gradients.items():
                assert np.array_equal(gradient, expected[name][0]), f"{granularity}: {name}"


@pytest.mark.parametrize("granularity", ["selective", "full"])
def test_steps_whose_parameters_arrive_while_they_run_train_the_same_weights(
    granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that run again in the backward pass ask for their parameters again; three optimizer steps on two ranks."""
    parallel = ParallelConfig(overlap_param_gather=True)
    keeping = run_distributed(test_overlap._train, 2, parallel, True)
    config = dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(CONFIG.vision, recompute_granularity=granularity),
        language=dataclasses.replace(CONFIG.language, recompute_granularity=granularity),
    )
    monkeypatch.setattr(test_overlap, "CONFIG", config)
    found = run_distributed(test_overlap._train, 2, parallel, True)
    for ours, theirs in zip(found, keeping, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], value) for name, value in theirs.items())


@pytest.fixture(scope="module")
def one_process() -> Any:
    """Losses and gradients of one process with subsets, two rows per micro-batch; one micro-batch has no image."""
    results = run_distributed(_run, 1, Saving("single", 2, drop_path_mode="subset"))
    return results[0][0], _whole_gradients(results, 1)


@pytest.mark.parametrize(
    "layout",
    [
        Saving("tp2", 2, tensor=2, drop_path_mode="subset"),
        Saving("pp3 inside both towers", 2, cuts=("vision.2", "language.1"), drop_path_mode="subset"),
        Saving("tp2 x pp2, recomputed", 2, tensor=2, cuts=("vision.1",), drop_path_mode="subset", recompute="full"),
    ],
    ids=lambda layout: layout.name,
)
def test_subsets_are_the_same_on_all_ranks_that_share_a_micro_batch(layout: Saving, one_process: Any) -> None:
    results = run_distributed(_run, layout.world_size, layout)
    _check(results[0][0], _whole_gradients(results, layout.tensor), *one_process)


def test_subsets_are_another_drop_path_than_masks(one_process: Any) -> None:
    """The grid would also pass if the mode were ignored."""
    masked = run_distributed(_run, 1, Saving("single", 2))[0][0]
    assert masked[1] != pytest.approx(one_process[0][1], rel=1e-4)
