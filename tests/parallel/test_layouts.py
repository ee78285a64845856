"""The invariant of the project: losses and gradients of a global batch do not depend on the parallel layout.

Oracle: a single process on the same global batch. Rows have uneven image counts, one micro-batch has none, drop-path
is on. With ``contrastive_scope = global`` every layout must equal one micro-batch that holds all rows; with
``micro_batch`` those layouts are alike whose micro-batches hold the same rows, and the generation loss is for all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lcl_megatron.config import (
    DataConfig,
    LanguageConfig,
    LossConfig,
    ParallelConfig,
    PoolConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel import engine as engines
from lcl_megatron.parallel.agreement import agree
from lcl_megatron.parallel.report import sum_over_data_parallel
from lcl_megatron.training.objective import losses_and_gradients
from tests.batches import Document, layout_of, make_rows, merge
from tests.distributed import run_distributed

# Eight rows of 64 tokens; images stand at their <BoI>. Rows 4 and 5 have none: with one row per micro-batch two
# micro-batches are without images, with two rows (or two ranks) a whole contrast group is.
ROWS: list[list[Document]] = [
    [(30, (3, 12)), (34, (0,))],
    [(64, (5, 20, 40))],
    [(50, (2,)), (14, (3,))],
    [(40, (9,))],
    [(20, ()), (30, ())],
    [(64, ())],
    [(33, (1, 8, 15)), (31, (2, 20))],
    [(60, (50,))],
]
STEP = 3
LOSS_TOLERANCE = 1e-5
"""Relative, fp32; seen: at most 3e-7."""
GRADIENT_TOLERANCE = 1e-5
"""Norm of the difference relative to the norm of the gradient, fp32; seen: at most 2e-6."""
DOUBLE_TOLERANCE = 1e-10
"""The same for losses and gradients in fp64."""
ZERO_GRADIENTS = {"pool.key_projection.bias", "pool.key_layernorm.bias"}
"""Shifting all keys alike does not change a softmax: these gradients are zero but for rounding."""

CONFIG = RunConfig(
    vision=VisionConfig(
        image_size=28,
        patch_size=14,
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        layer_scale_init=1.0,
        drop_path_rate=0.4,
    ),
    pool=PoolConfig(num_attention_heads=4),
    language=LanguageConfig(
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=64,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=64,
    ),
    # A large weight, so that an error in the contrast is not hidden behind the generation loss.
    loss=LossConfig(contrastive_loss_weight=1.0, contrastive_tile_size=3, cross_entropy_chunk_size=50),
    data=DataConfig(seq_length=64),
    training=TrainingConfig(global_batch_size=8, precision="fp32", transformer_impl="torch"),
)


@dataclass(frozen=True)
class Layout:
    """A row of the grid."""

    name: str
    micro_batch_size: int
    data_parallel_size: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    cuts: tuple[str, ...] = ()
    stages_per_rank: int = 1
    latent_regression: float = 0.0
    scope: Literal["micro_batch", "global"] = "micro_batch"
    keep_graphs: bool = False
    double: bool = False
    context: int = 1

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * self.tensor * self.context * self.pipeline

    @property
    def pipeline(self) -> int:
        return (len(self.cuts) + 1) // self.stages_per_rank

    def config(self) -> RunConfig:
        return dataclasses.replace(
            CONFIG,
            loss=dataclasses.replace(
                CONFIG.loss,
                latent_regression_loss_weight=self.latent_regression,
                contrastive_scope=self.scope,
                contrastive_keep_graphs=self.keep_graphs,
            ),
            training=dataclasses.replace(CONFIG.training, micro_batch_size=self.micro_batch_size),
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tensor,
                sequence_parallel=self.sequence_parallel,
                context_parallel_size=self.context,
                pipeline_model_parallel_size=self.pipeline,
                virtual_pipeline_model_parallel_size=self.stages_per_rank,
                pipeline_cuts=self.cuts,
            ),
        )


SEVEN_CUTS = ("vision.0", "vision.1", "vision.2", "pool", "language.embed", "language.0", "heads")

LAYOUTS = [
    Layout("dp2", 1, data_parallel_size=2),
    Layout("dp2, micro-batches of 2", 2, data_parallel_size=2),
    Layout("dp4", 1, data_parallel_size=4),
    Layout("micro-batches of 4", 4),
    Layout("micro-batches of 8", 8),
    Layout("tp2", 2, tensor=2),
    Layout("tp2, sequence parallel", 1, tensor=2, sequence_parallel=True),
    Layout("tp4, sequence parallel", 2, tensor=4, sequence_parallel=True),
    Layout("pp2 inside the ViT", 2, cuts=("vision.1",)),
    Layout("pp2 before the pool", 1, cuts=("pool",)),
    Layout("pp2 before the token embedding", 2, cuts=("language.embed",)),
    Layout("pp2 inside the LM", 2, cuts=("language.1",)),
    Layout("pp2 before the heads", 2, cuts=("heads",)),
    Layout("pp3", 2, cuts=("vision.2", "language.1")),
    Layout("pp4", 1, cuts=("vision.1", "pool", "heads")),
    Layout("tp2 x pp2", 2, tensor=2, cuts=("language.1",)),
    Layout("tp2 x pp2, sequence parallel, inside the ViT", 1, tensor=2, sequence_parallel=True, cuts=("vision.2",)),
    Layout(
        "tp2 x pp2, sequence parallel, before the embedding",
        2,
        tensor=2,
        sequence_parallel=True,
        cuts=("language.embed",),
    ),
    Layout("pp2 x 2 stages", 2, cuts=("vision.1", "pool", "language.1"), stages_per_rank=2),
    # Token embedding and heads are on one rank, which holds both copies of the tied matrix.
    Layout("pp2 x 2 stages, tied on a rank", 1, cuts=("pool", "language.embed", "heads"), stages_per_rank=2),
    Layout("pp2 x 4 stages", 1, cuts=SEVEN_CUTS, stages_per_rank=4),
    Layout("pp4 x 2 stages", 2, cuts=SEVEN_CUTS, stages_per_rank=2),
    Layout("dp2 x pp2 x 2 stages", 1, 2, cuts=("vision.2", "language.embed", "language.1"), stages_per_rank=2),
    Layout(
        "tp2 x pp2 x 2 stages, sequence parallel",
        1,
        tensor=2,
        sequence_parallel=True,
        cuts=("vision.1", "language.embed", "language.1"),
        stages_per_rank=2,
    ),
    Layout("dp2 x pp2", 1, data_parallel_size=2, cuts=("vision.2",)),
    Layout("dp2 x tp2", 1, data_parallel_size=2, tensor=2),
    Layout("dp2 x tp2, sequence parallel", 2, data_parallel_size=2, tensor=2, sequence_parallel=True),
    # Documents end within and at the border of chunks of 16 (cp2) and 8 (cp4) positions; some rows have fewer images
    # than there are ranks.
    Layout("cp2", 1, context=2),
    Layout("cp2, micro-batches of 8", 8, context=2),
    Layout("cp4", 2, context=4),
    Layout("cp2 x dp2", 1, data_parallel_size=2, context=2),
    Layout("cp2 x tp2", 2, tensor=2, context=2),
    Layout("cp2 x tp2, sequence parallel", 1, tensor=2, sequence_parallel=True, context=2),
    Layout("cp2 x pp2 inside the ViT", 1, cuts=("vision.1",), context=2),
    Layout("cp2 x pp2 before the token embedding", 2, cuts=("language.embed",), context=2),
    Layout("cp2 x pp3", 1, cuts=("pool", "language.1"), context=2),
    Layout(
        "cp2 x tp2 x pp2, sequence parallel, inside the ViT",
        2,
        tensor=2,
        sequence_parallel=True,
        cuts=("vision.2",),
        context=2,
    ),
    Layout("cp2 x dp2 x pp2 inside the LM", 1, data_parallel_size=2, cuts=("language.1",), context=2),
    Layout("cp2 x pp2 x 2 stages", 1, cuts=("vision.1", "language.embed", "language.1"), stages_per_rank=2, context=2),
]

LAYOUTS_OF_REGRESSION = [
    Layout("dp2", 1, data_parallel_size=2, latent_regression=2.0),
    Layout("dp2, micro-batches of 2", 2, data_parallel_size=2, latent_regression=2.0),
    Layout("micro-batches of 4", 4, latent_regression=2.0),
    Layout("tp2", 2, tensor=2, latent_regression=2.0),
    Layout("tp2, sequence parallel", 1, tensor=2, sequence_parallel=True, latent_regression=2.0),
    Layout("dp2 x tp2, sequence parallel", 2, 2, tensor=2, sequence_parallel=True, latent_regression=2.0),
]

LAYOUTS_OF_GLOBAL_SCOPE = [
    *(dataclasses.replace(layout, scope="global") for layout in LAYOUTS),
    Layout("one process", 1, scope="global"),
    Layout("one process, graphs kept", 1, scope="global", keep_graphs=True),
    Layout("one process, uneven", 2, scope="global", keep_graphs=True),
    Layout("dp2, graphs kept", 2, data_parallel_size=2, scope="global", keep_graphs=True),
    Layout("dp2 x tp2, graphs kept", 1, 2, tensor=2, sequence_parallel=True, scope="global", keep_graphs=True),
    Layout("cp2 x tp2, graphs kept", 2, tensor=2, sequence_parallel=True, context=2, scope="global", keep_graphs=True),
    Layout("graphs kept, regression", 2, 2, latent_regression=2.0, scope="global", keep_graphs=True),
    Layout("two passes, regression", 2, 2, latent_regression=2.0, scope="global"),
]
"""Four of the ranks at most, and one to eight micro-batches, of which some have no images."""

LAYOUTS_IN_DOUBLE = [
    Layout("one process", 1, scope="global", double=True),
    Layout("one process, graphs kept", 2, scope="global", keep_graphs=True, double=True),
    Layout("dp2", 1, data_parallel_size=2, scope="global", double=True),
    Layout("tp2, sequence parallel", 1, tensor=2, sequence_parallel=True, scope="global", double=True),
    Layout("pp3", 2, cuts=("vision.2", "language.1"), scope="global", double=True),
    Layout("tp2 x pp2", 2, tensor=2, cuts=("language.1",), scope="global", double=True),
    Layout("dp2 x pp2", 1, data_parallel_size=2, cuts=("vision.2",), scope="global", double=True),
    Layout("cp2", 1, context=2, scope="global", double=True),
    Layout("cp2 x pp2", 2, context=2, cuts=("language.embed",), scope="global", double=True),
    Layout("pp2 x 4 stages", 1, cuts=SEVEN_CUTS, stages_per_rank=4, scope="global", double=True),
]

Gradients = dict[str, tuple[np.ndarray, int | None]]


def _run(rank: int, world_size: int, layout: Layout) -> tuple[list[float], Gradients, tuple[int, int]]:
    """Return losses, this rank's gradients with the dimension that tp splits, and (tp rank, dp rank)."""
    config = layout.config()
    if layout.double:
        _compute_in_double()
    groups = engines.start(config)
    engine = engines.build_engine(config, groups)
    with torch.no_grad():
        for parameter in (parameter for model in engine.models for parameter in model.parameters()):
            # Initial weights are so small that most of the model would hardly matter.
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    size, rows = layout.micro_batch_size, make_rows(config, ROWS)
    slots = [merge(rows[i : i + size]) for i in range(0, len(rows), size)]
    grid = [slots[i : i + groups.dp_size] for i in range(0, len(slots), groups.dp_size)]
    batch = StepBatch(STEP, layout_of(grid), tuple(ranks[groups.dp_rank] for ranks in grid))
    agreed = agree(batch, groups)
    engine.zero_gradients()
    losses = losses_and_gradients(engine, agreed, whole_gradients=True)
    sums = torch.zeros(3, dtype=torch.float64)
    for loss in losses:
        sums[:2] += torch.stack([loss.generation_loss, loss.contrastive_loss])
        sums[2] += 0.0 if loss.latent_regression_loss is None else loss.latent_regression_loss
    totals = sum_over_data_parallel(sums, groups, engine.has_losses)
    gradients = {
        name: (
            parameter.main_grad.numpy().copy(),
            parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None,
        )
        for model in engine.models
        for name, parameter in model.named_parameters()
    }
    return totals, gradients, (groups.tp_rank, groups.dp_rank)


def _compute_in_double() -> None:
    """Let this process compute in float64 what it computes in float32 otherwise: parameters, losses, gradients."""
    engines._DTYPES["fp32"] = torch.float64
    # The vocabulary's logits, in megatron-core's cross-entropy too.
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign, assignment]
    original = engines.DistributedDataParallelConfig
    engines.DistributedDataParallelConfig = lambda **kwargs: original(  # type: ignore[misc, assignment]
        **{**kwargs, "grad_reduce_in_fp32": False}
    )


def _whole_gradients(results: list[Any], tensor: int) -> dict[str, np.ndarray]:
    """Return the gradient of every parameter of the model; copies of one must agree."""
    parts: dict[str, dict[int, tuple[np.ndarray, int | None]]] = {}
    for _, gradients, (tp_rank, _) in results:
        for name, part in gradients.items():
            # The last stage's copy of the tied matrix is the embedding, whose gradient both copies must hold.
            name = "language.embedding.word_embeddings.weight" if name == "language.output_projection.weight" else name
            known = parts.setdefault(name, {}).setdefault(tp_rank, part)
            np.testing.assert_allclose(part[0], known[0], rtol=1e-6, atol=1e-9, err_msg=name)
    whole = {}
    for name, by_rank in parts.items():
        first, dim = by_rank[0]
        if dim is None:
            for replica, _ in by_rank.values():
                np.testing.assert_allclose(replica, first, rtol=1e-4, atol=1e-7, err_msg=f"{name} differs over tp")
            whole[name] = first
        else:
            whole[name] = np.concatenate([by_rank[rank][0] for rank in range(tensor)], axis=dim)
    return whole


@pytest.fixture(scope="module")
def references() -> dict[int, tuple[list[float], dict[str, np.ndarray]]]:
    """A single process, by rows per contrast group."""
    found = {}
    for size in (1, 2, 4, 8):
        results = run_distributed(_run, 1, Layout("single", size))
        found[size] = results[0][0], _whole_gradients(results, 1)
    return found


@pytest.fixture(scope="module")
def reference_in_double() -> tuple[list[float], dict[str, np.ndarray]]:
    """A single process, one micro-batch."""
    results = run_distributed(_run, 1, Layout("single", 8, double=True))
    return results[0][0], _whole_gradients(results, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_losses_and_gradients_equal_those_of_one_process(layout: Layout, references: dict[int, Any]) -> None:
    results = run_distributed(_run, layout.world_size, layout)
    expected = references[layout.micro_batch_size * layout.data_parallel_size]
    _check(results[0][0], _whole_gradients(results, layout.tensor), *expected)
    assert results[0][0][0] == pytest.approx(references[1][0][0], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS_OF_REGRESSION, ids=lambda layout: layout.name)
def test_latent_regression_does_not_depend_on_the_layout(layout: Layout, references: dict[int, Any]) -> None:
    rows = layout.micro_batch_size * layout.data_parallel_size
    single = run_distributed(_run, 1, Layout("single", rows, latent_regression=layout.latent_regression))
    results = run_distributed(_run, layout.world_size, layout)
    losses, gradients = single[0][0], _whole_gradients(single, 1)
    _check(results[0][0], _whole_gradients(results, layout.tensor), losses, gradients)
    # The other losses are what they were; the regression is there, and both the encoder and the head feel it.
    without, gradients_without = references[rows]
    assert losses[:2] == pytest.approx(without[:2], rel=LOSS_TOLERANCE)
    assert losses[2] > 0.1 > without[2] == 0.0
    for name in ("vision.layers.0.mlp.linear_fc1.weight", "language.heads.context_projection.weight"):
        change = np.linalg.norm(gradients[name] - gradients_without[name])
        assert change > 0.01 * np.linalg.norm(gradients_without[name]), name


@pytest.mark.parametrize("layout", LAYOUTS_OF_GLOBAL_SCOPE, ids=lambda layout: layout.name)
def test_global_scope_equals_one_micro_batch(layout: Layout, references: dict[int, Any]) -> None:
    expected = references[8]
    if layout.latent_regression:
        single = run_distributed(_run, 1, Layout("single", 8, latent_regression=layout.latent_regression))
        expected = single[0][0], _whole_gradients(single, 1)
    results = run_distributed(_run, layout.world_size, layout)
    _check(results[0][0], _whole_gradients(results, layout.tensor), *expected)


@pytest.mark.parametrize("layout", LAYOUTS_IN_DOUBLE, ids=lambda layout: layout.name)
def test_global_scope_in_double(layout: Layout, reference_in_double: Any) -> None:
    results = run_distributed(_run, layout.world_size, layout)
    gradients = _whole_gradients(results, layout.tensor)
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float64)}
    _check(results[0][0], gradients, *reference_in_double, tolerance=DOUBLE_TOLERANCE)


def test_scopes_differ(references: dict[int, Any]) -> None:
    """The grid would also pass if the batch's micro-batches did not matter to the contrast."""
    (_, few), (_, many) = references[1], references[8]
    assert references[1][0][1] < 0.9 * references[8][0][1]
    name = "vision.embedding.weight"
    assert np.linalg.norm(few[name] - many[name]) > 0.01 * np.linalg.norm(many[name])


def _check(
    losses: list[float],
    gradients: dict[str, np.ndarray],
    expected_losses: list[float],
    expected: dict[str, np.ndarray],
    tolerance: float = GRADIENT_TOLERANCE,
) -> None:
    assert losses == pytest.approx(expected_losses, rel=min(tolerance, LOSS_TOLERANCE))
    assert gradients.keys() == expected.keys()
    largest = max(np.linalg.norm(gradient) for gradient in expected.values())
    for name, gradient in expected.items():
        if name in ZERO_GRADIENTS:
            assert np.linalg.norm(gradients[name]) < 1e-6 * largest, name
        else:
            error = np.linalg.norm(gradients[name] - gradient) / np.linalg.norm(gradient)
            assert error <= tolerance, f"{name}: {error:.1e}"


def test_drop_path_is_on_in_the_grid(references: dict[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid would also pass with drop-path switched off; another step must give other features."""
    monkeypatch.setitem(globals(), "STEP", STEP + 1)
    other = run_distributed(_run, 1, Layout("single", 2))[0][0]
    assert other[1] != pytest.approx(references[2][0][1], rel=1e-4)
