"""Context parallelism, piece by piece. Oracles: the same operation on the whole rows in one process, in float64;
attention written out in plain torch; autograd by one process for gradients, which here are summed over ranks by hand.

Losses and gradients of whole steps are compared in ``test_layouts.py``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from lcl_megatron.config import ParallelConfig, RunConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.model.attention import TorchCoreAttention
from lcl_megatron.model.lcl import LCLModel, LCLOutput
from lcl_megatron.model.row_edge import WholeRows
from lcl_megatron.model.specs import Runtime, language_transformer_config
from lcl_megatron.parallel.context import ContextParallelRows
from lcl_megatron.parallel.groups import initialize
from lcl_megatron.parallel.sequence import TensorParallelSequence
from tests.batches import Document, make_rows, merge
from tests.distributed import run_distributed
from tests.model import plain

ROWS: dict[str, list[list[Document]]] = {
    "several documents": [[(30, (3, 12)), (34, (0,))], [(64, (5, 20, 40))], [(50, (2,)), (13, (3,))]],
    "one image": [[(64, (30,))], [(20, ()), (44, ())]],
    "no image": [[(20, ()), (30, ())]],
}
TOLERANCE = 1e-10
"""Relative, of float64."""


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _rows(cp: int, row_length: int, tp: int = 1) -> tuple[ContextParallelRows, Any]:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=tp > 1)
    groups = initialize(parallel, lambda pipeline: pipeline[:1])
    return ContextParallelRows(groups, row_length), groups


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max(initial=0.0) / max(1e-300, np.abs(expected).max(initial=0.0)))


@pytest.mark.parametrize("cp", [2, 4])
def test_attention_and_its_gradient_equal_those_over_whole_rows(cp: int, tiny_run: RunConfig) -> None:
    batch = merge(make_rows(tiny_run, ROWS["several documents"]))
    rows, length = batch.tokens.shape
    inputs = [_random(seed, rows * length, 2, 4) for seed in range(3)]
    direction = _random(3, rows * length, 8)

    def attend(rank: int, world_size: int) -> list[np.ndarray]:
        edge, groups = _rows(cp, length)
        config = language_transformer_config(tiny_run.language, Runtime(groups.collection))
        core = TorchCoreAttention(config, 1, AttnMaskType.causal)
        part = edge.part(batch)
        own = [edge.own(x.unflatten(0, (rows, length))).flatten(0, 1).requires_grad_() for x in inputs]
        output = core(*own, packed_seq_params=edge.sequences(part))
        gradients = torch.autograd.grad(output, own, edge.own(direction.unflatten(0, (rows, length))).flatten(0, 1))
        return [x.detach().numpy() for x in (output, *gradients)]

    whole = [x.requires_grad_() for x in inputs]
    output = plain.attend_each(*whole, batch.cu_seqlens.tolist(), causal=True)
    expected = [output, *torch.autograd.grad(output, whole, direction)]
    results = run_distributed(attend, cp)
    for rank, found in enumerate(results):
        for x, y in zip(found, expected, strict=True):
            mine = _take(y.detach(), rows, cp, rank)
            assert _error(x, mine.numpy()) < TOLERANCE


def _take(values: Tensor, rows: int, cp: int, rank: int) -> Tensor:
    """A rank's entries of (T, ...), by chunks."""
    chunks = values.unflatten(0, (rows, 2 * cp, -1))
    return torch.cat([chunks[:, rank], chunks[:, 2 * cp - 1 - rank]], dim=1).flatten(0, 1)


def _loss(output: LCLOutput) -> Tensor:
    """A loss that differs between images, in float64: of what every rank has alike."""
    weights = torch.arange(1.0, output.pooled_ND.numel() + 1, dtype=torch.float64).view(output.pooled_ND.shape).sin()
    mixed = output.pooled_ND @ output.context_ND.T * output.logit_scale.double()
    return mixed.square().sum() + (weights * (output.pooled_ND + output.context_ND.cos())).sum()


def _gradients(config: RunConfig, runtime: Runtime, batch: PackedBatch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of this rank; token losses, which are float32, have no part in them."""
    model = LCLModel(config, runtime)
    plain.randomize(model, seed=1)
    output = model(batch, step=4)
    assert isinstance(output, LCLOutput)
    loss = _loss(output)
    (loss + 0.0 * output.token_losses_K.sum()).backward()
    return float(loss.detach()), {name: p.grad.numpy() for name, p in model.named_parameters()}


def _model_on_ranks(config: RunConfig, batch: PackedBatch, cp: int, rank: int, world_size: int) -> Any:
    rows, groups = _rows(cp, config.data.seq_length)
    runtime = Runtime(groups.collection, rows=rows, params_dtype=torch.float64)
    part = rows.part(batch)
    loss, gradients = _gradients(config, runtime, part)
    for gradient in gradients.values():
        dist.all_reduce(torch.from_numpy(gradient), group=groups.cp)
    return loss, gradients, part.num_encoded


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_contrast_features_and_their_gradients_equal_one_process_in_float64(
    rows: list[list[Document]], cp: int, tiny_run: RunConfig
) -> None:
    vision = dataclasses.replace(tiny_run.vision, drop_path_rate=0.4)
    config = dataclasses.replace(tiny_run, vision=vision)
    batch = merge(make_rows(config, rows))

    def single(rank: int, world_size: int) -> Any:
        groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
        return _gradients(config, Runtime(groups.collection, params_dtype=torch.float64), batch)

    loss, expected = run_distributed(single, 1)[0]
    results = run_distributed(functools.partial(_model_on_ranks, config, batch, cp), cp)
    scale = expected.pop("logit_scale")  # of float32
    for found_loss, found, _ in results:
        assert found_loss == pytest.approx(loss, rel=TOLERANCE)
        assert found.pop("logit_scale") == pytest.approx(scale, rel=1e-6)
        plain.assert_same_gradients(_tensors(found), _tensors(expected), TOLERANCE)
    # Encoded once, but for ranks that would have none.
    assert sum(encoded for *_, encoded in results) == max(batch.num_image_slots, cp)


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_parameters_that_matter_are_compared(tiny_run: RunConfig) -> None:
    """The comparison above must not be one of zeros."""
    batch = merge(make_rows(tiny_run, ROWS["several documents"]))

    def single(rank: int, world_size: int) -> Any:
        groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
        return _gradients(tiny_run, Runtime(groups.collection, params_dtype=torch.float64), batch)

    gradients = run_distributed(single, 1)[0][1]
    small = {name for name, gradient in gradients.items() if np.abs(gradient).max() < 1e-6}
    of_text = {"language.heads.final_layernorm.weight", "language.heads.final_layernorm.bias"}
    assert small <= of_text | {"pool.key_projection.bias", "pool.key_layernorm.bias"}


def test_a_rank_without_targets_has_a_loss_of_zero_that_reaches_all_parameters(tiny_run: RunConfig) -> None:
    """Targets in the first quarter only: with two ranks, the second one holds none."""
    batch = merge(make_rows(tiny_run, [[(10, ()), (54, ())]]))
    batch = dataclasses.replace(batch, label_positions=batch.label_positions[batch.label_positions < 10])

    def run(rank: int, world_size: int) -> tuple[int, float, set[str]]:
        rows, groups = _rows(2, 64)
        model = LCLModel(tiny_run, Runtime(groups.collection, rows=rows))
        plain.randomize(model, seed=1)
        output: Any = model(rows.part(batch), step=0)
        total = output.token_losses_K.sum()
        total.backward()
        missing = {
            name for name, p in model.named_parameters() if p.grad is None and name.startswith("language.layers")
        }
        return len(output.token_losses_K), float(total.detach()), missing

    first, second = run_distributed(run, 2)
    assert first[0] == len(batch.label_positions)
    assert first[1] > 1.0
    assert second[:2] == (1, 0.0)
    assert first[2] == second[2] == set()


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("num_images", [1, 2, 5])
def test_gathered_features_and_their_gradients(num_images: int, cp: int) -> None:
    """Latents: gradients of all ranks add up. Global latents: all ranks have the same gradient, which counts once."""
    features = _random(0, num_images, 2, 3)
    gradients = [_random(10 + rank, num_images, 2, 3) for rank in range(cp)]

    def gather(rank: int, world_size: int) -> list[np.ndarray]:
        edge, _ = _rows(cp, 12)
        begin, end = num_images * rank // cp, num_images * (rank + 1) // cp
        encoded = features[begin:end] if end > begin else 7 * torch.ones(1, 2, 3, dtype=torch.float64)
        outputs = []
        for gathered, gradient in ((edge.gather_latents, gradients[rank]), (edge.gather_pooled, gradients[0])):
            own = encoded.clone().requires_grad_()
            output = gathered(own, num_images)
            outputs += [output.detach().numpy(), torch.autograd.grad(output, own, gradient)[0].numpy()]
        return outputs

    for rank, (latents, of_latents, pooled, of_pooled) in enumerate(run_distributed(gather, cp)):
        assert (latents == features.numpy()).all()
        assert (pooled == features.numpy()).all()
        own = slice(num_images * rank // cp, num_images * (rank + 1) // cp)
        for found, whole in ((of_latents, torch.stack(gradients).sum(0)), (of_pooled, gradients[0])):
            expected = whole[own].numpy() if own.stop > own.start else np.zeros((1, 2, 3))
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_places_rows_and_features_with_their_holder() -> None:
    """Rows of 8, chunks of 2: rank 0 holds 0, 1, 6, 7 of each row; the latents stand at 1, 2 and at 6, 7, 13."""
    positions, holders = torch.tensor([1, 2, 6, 7, 13]), [0, 1, 0, 0, 1]
    hidden, rows = _random(0, 2, 8, 3), _random(1, 5, 3)

    def place(rank: int, world_size: int) -> list[np.ndarray]:
        edge, _ = _rows(2, 8)
        inputs = [edge.own(hidden).flatten(0, 1).clone().requires_grad_(), rows.clone().requires_grad_()]
        placed = edge.place(*inputs, positions)
        gradients = torch.autograd.grad(placed, inputs, torch.ones_like(placed))
        own = rows.clone().requires_grad_()
        features = edge.of_holders(own * (rank + 1), positions)
        return [x.detach().numpy() for x in (placed, *gradients, features, *torch.autograd.grad(features.sum(), own))]

    whole = WholeRows().place(hidden.flatten(0, 1), rows, positions)
    scale = 1.0 + np.array(holders)[:, None]
    for rank, found in enumerate(run_distributed(place, 2)):
        placed, of_hidden, of_rows, features, of_features = found
        is_here = np.array(holders)[:, None] == rank
        assert (placed == _take(whole, 2, 2, rank).numpy()).all()
        replaced = _take(torch.zeros(16).index_fill(0, positions, 1.0), 2, 2, rank).numpy()
        assert (of_hidden == 1 - replaced[:, None]).all()
        assert (of_rows == is_here * np.ones((5, 3))).all()
        assert (features == rows.numpy() * scale).all()
        assert (of_features == is_here * scale * np.ones((5, 3))).all()


def test_a_parameter_used_alike_gets_its_gradient_once() -> None:
    def use(rank: int, world_size: int) -> tuple[float, float]:
        edge, _ = _rows(4, 8)
        parameter = torch.tensor(3.0, requires_grad=True)
        used = edge.once(parameter)
        (5 * used).backward()
        return float(used.detach()), float(parameter.grad)

    assert run_distributed(use, 4) == [(3.0, 5.0), (3.0, 0.0), (3.0, 0.0), (3.0, 0.0)]


def test_rows_are_picked_through_both_splits() -> None:
    """cp2 x tp2 with sequence parallelism: rows of 8, of which each rank holds 2 of each row's 4 on its cp rank."""
    positions, hidden = torch.tensor([0, 15, 6, 3, 9]), _random(0, 2, 8, 3)

    def pick(rank: int, world_size: int) -> tuple[int, np.ndarray]:
        edge, groups = _rows(2, 8, tp=2)
        sequence = TensorParallelSequence(groups)
        own = sequence.scatter(edge.own(hidden).flatten(0, 1)[:, None])
        assert own.shape[0] == 4
        picked = sequence.pick_rows(own, edge.local(positions))
        return groups.cp_rank, edge.of_holders(picked, positions).numpy()

    results = run_distributed(pick, 4)
    assert sorted(cp_rank for cp_rank, _ in results) == [0, 0, 1, 1]
    for _, rows in results:
        assert (rows == hidden.flatten(0, 1)[positions].numpy()).all()


def test_a_part_has_its_images_and_targets_and_all_positions_stay_those_of_the_rows(tiny_run: RunConfig) -> None:
    batch = merge(make_rows(tiny_run, ROWS["several documents"]))

    def parts(rank: int, world_size: int) -> dict[str, Any]:
        edge, _ = _rows(2, 64)
        part = edge.part(batch)
        blind = edge.part(dataclasses.replace(batch, images=None))
        assert blind.images is None
        kept = {f.name for f in dataclasses.fields(batch) if getattr(part, f.name) is getattr(batch, f.name)}
        return {"targets": part.label_positions.tolist(), "keys": part.image_keys.tolist(), "kept": kept}

    first, second = run_distributed(parts, 2)
    assert sorted(first["targets"] + second["targets"]) == batch.label_positions.tolist()
    assert {position % 64 // 16 for position in first["targets"]} == {0, 3}
    assert first["keys"] + second["keys"] == batch.image_keys.tolist()
    changed = {"label_positions", "image_keys", "images", "runs"}
    assert first["kept"] == {f.name for f in dataclasses.fields(batch)} - changed


def test_one_rank_alone_sees_everything(tiny_run: RunConfig) -> None:
    edge = WholeRows()
    batch = merge(make_rows(tiny_run, ROWS["one image"]))
    assert edge.part(batch) is batch
    for function in (edge.own, edge.local, edge.once):
        assert function(batch.tokens) is batch.tokens
    assert edge.gather_latents(batch.tokens, 2) is edge.gather_pooled(batch.tokens, 2) is batch.tokens
    assert edge.of_holders(batch.tokens, batch.tokens) is batch.tokens
    assert edge.sequences(batch).exchange is None
