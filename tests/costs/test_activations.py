"""What a forward pass keeps.

Oracle: the tensors that autograd really saves while the model runs, each storage once, parameters and gathered buffers
left out. On a CPU the language layers attend document by document, and so keep the attention's output twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lcl_megatron.config import ParallelConfig, RunConfig
from lcl_megatron.costs.activations import StageActivations
from lcl_megatron.costs.counts import MicroBatchCounts
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.model.lcl import Activations
from lcl_megatron.parallel import engine as engines
from tests.batches import make_rows, merge
from tests.distributed import run_distributed
from tests.parallel.test_layouts import CONFIG, ROWS, STEP

Storages = dict[int, torch.UntypedStorage]


def saved_bytes(function: Callable[[], Any], known: Storages) -> tuple[Any, int]:
    """Return the result and the bytes of storages that it saves and that are not known; they become known."""
    found: Storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    # Kept alive, so that no later storage gets the same address.
    known |= found
    return result, sum(storage.nbytes() for storage in found.values())


def measure(rank: int, world_size: int, config: RunConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Return measured and predicted bytes of each part."""
    groups = engines.start(config)
    engine = engines.build_engine(config, groups)
    model: Any = engine.model
    batch: PackedBatch = merge(make_rows(config, ROWS[: config.training.micro_batch_size]))
    known: Storages = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()}

    def see() -> tuple[torch.Tensor, torch.Tensor]:
        patches = model.vision.encode(model.vision.embed(batch.images), batch.image_keys, model._drop_path(STEP))
        return model.pool(model.vision.finish(patches, batch.num_image_slots))

    (latents, pooled), vision = saved_bytes(see, known)
    hidden, language = saved_bytes(lambda: model.language.decode(model.language.embed(batch, latents), batch), known)
    state = Activations(pooled_ND=pooled, hidden_T1H=hidden)
    _, heads = saved_bytes(lambda: model._finish(batch, state), known)
    counts = MicroBatchCounts(batch.num_images, len(batch.label_positions), batch.num_images)
    predicted = StageActivations(config, engine.stages[0]).micro_batch(counts)
    return {"vision": vision, "language": language, "heads": heads}, predicted


def changed(**sections: dict[str, Any]) -> RunConfig:
    sections["training"] = {"micro_batch_size": 4, **sections.get("training", {})}
    parts = {name: dataclasses.replace(getattr(CONFIG, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(CONFIG, **parts)


CASES = [
    ("as it is", 1, changed()),
    ("plain", 1, changed(vision={"layer_scale_init": None, "drop_path_rate": 0.0, "class_token": False})),
    ("GELU, longer towers", 1, changed(vision={"num_layers": 4}, language={"num_layers": 3, "activation": "gelu"})),
    ("QuickGELU", 1, changed(vision={"activation": "quick_gelu"})),
]


def attended_twice(config: RunConfig) -> float:
    tokens = config.training.micro_batch_size * config.data.seq_length
    language = config.language
    return 4 * language.num_layers * tokens * language.hidden_size / config.parallel.tensor_model_parallel_size


@pytest.mark.parametrize(("name", "world_size", "config"), CASES, ids=[case[0] for case in CASES])
def test_kept_bytes_are_those_that_autograd_saves(name: str, world_size: int, config: RunConfig) -> None:
    measured, predicted = run_distributed(measure, world_size, config)[0]
    # The first layer never drops a branch.
    flags = 2 * 9 * config.vision.num_tokens * 4 * (config.vision.drop_path_rate > 0)
    assert predicted["vision"] - measured["vision"] == flags
    assert predicted["language"] == measured["language"] - attended_twice(config)
    assert predicted["heads"] == measured["heads"]


@pytest.mark.parametrize("is_split", [False, True])
def test_tensor_parallelism_splits_what_lies_between_products(is_split: bool) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=is_split)
    config = dataclasses.replace(changed(), parallel=parallel)
    for measured, predicted in run_distributed(measure, 2, config):
        measured["language"] -= attended_twice(config)
        for part, size in measured.items():
            # An odd number of image tokens is padded to an even one, and the attention's output copied for it.
            assert predicted[part] == pytest.approx(size, rel=0.05), part
