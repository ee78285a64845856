"""Stages and what travels between them. Oracles: the whole model; counts by hand for shapes and embedding ranks.

The stages run one after the other in this process; on ranks, with the real transfers, they run in ``test_layouts.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lcl_megatron.config import ConfigError, ParallelConfig, RunConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.model.initialization import initialize_weights
from lcl_megatron.model.lcl import Activations, LCLModel, LCLOutput
from lcl_megatron.model.line import cut_line, line_of_pieces
from lcl_megatron.model.specs import Runtime, language_transformer_config
from lcl_megatron.parallel.groups import initialize
from lcl_megatron.parallel.pipeline import (
    PipelineStage,
    PlannedP2PCommunicator,
    boundary_shape,
    embedding_ranks,
    pack,
    sum_tied_gradients,
    unpack,
)
from tests.batches import Document, make_rows, merge

TIED = "language.embedding.word_embeddings.weight"
BATCHES: dict[str, list[list[Document]]] = {
    "images": [[(30, (3, 12)), (34, (0,))], [(50, (2,))]],
    "no image": [[(30, ())], [(64, ())]],
}
CUTS = [
    ("vision.0",),
    ("vision.1",),
    ("pool",),
    ("language.embed",),
    ("language.0",),
    ("language.1",),
    ("heads",),
    ("vision.1", "pool", "language.embed", "heads"),
]


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    yield Runtime(collection=groups.collection)
    groups.destroy()


@pytest.fixture
def config(tiny_run: RunConfig) -> RunConfig:
    return dataclasses.replace(tiny_run, vision=dataclasses.replace(tiny_run.vision, drop_path_rate=0.5))


def _loss(output: LCLOutput) -> Tensor:
    return output.token_losses_K.sum() + output.pooled_ND.square().sum() + output.context_ND.sum() * output.logit_scale


def _cut(config: RunConfig, cuts: tuple[str, ...]) -> RunConfig:
    parallel = ParallelConfig(pipeline_model_parallel_size=len(cuts) + 1, pipeline_cuts=cuts)
    return dataclasses.replace(config, parallel=parallel)


def _enlarge(model: LCLModel) -> None:
    """Initial weights are so small that most of the model would hardly matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("cuts", CUTS, ids="+".join)
def test_stages_in_a_row_equal_the_whole_model(
    cuts: tuple[str, ...], rows: list[list[Document]], config: RunConfig, runtime: Runtime
) -> None:
    batch = merge(make_rows(config, rows))
    whole = LCLModel(config, runtime)
    initialize_weights(whole, seed=1)
    _enlarge(whole)
    expected = whole(batch, step=6)
    _loss(expected).backward()

    config = _cut(config, cuts)
    stages = cut_line(config)
    schedule = language_transformer_config(config.language, runtime)
    models, gradients = [], []
    travelling = None
    for stage in stages:
        module = PipelineStage(config, stage, runtime, schedule)
        initialize_weights(module.model, seed=1)
        _enlarge(module.model)
        models.append(module.model)
        if travelling is not None:
            assert tuple(travelling.shape) == boundary_shape(stage.first_piece, config, batch.num_images)
            module.set_input_tensor([travelling])
        # Stages that do not see pixels must not need them.
        seen = batch if stage.is_first else dataclasses.replace(batch, images=None)
        travelling = module(seen, 6)
    for name in ("token_losses_K", "pooled_ND", "context_ND", "logit_scale"):
        torch.testing.assert_close(getattr(travelling, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    _loss(travelling).backward()

    found: dict[str, Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            # The copy of the tied matrix on the last stage: the embedding group sums both gradients.
            name = TIED if getattr(parameter, "shared", False) else name
            gradients.append(name)
            found[name] = found.get(name, 0) + parameter.grad
    assert found.keys() == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("piece", ["vision.1", "pool", "language.embed", "language.0", "heads"])
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_unpacking_undoes_packing_and_shapes_are_as_planned(piece: str, num_images: int, tiny_run: RunConfig) -> None:
    slots, patches, width = max(1, num_images), 4, 32
    pooled = torch.randn(slots, width)
    sent = {
        "vision": Activations(patches_T1C=torch.randn(slots * 5, 1, width)),
        "embed": Activations(latents_NLH=torch.randn(slots, patches, width), pooled_ND=pooled),
        "language": Activations(hidden_T1H=torch.randn(2 * 64, 1, width), pooled_ND=pooled),
    }[{"vision.1": "vision", "pool": "vision", "language.embed": "embed"}.get(piece, "language")]
    tensor = pack(sent)
    assert tuple(tensor.shape) == boundary_shape(piece, tiny_run, num_images)
    received = unpack(tensor, piece, slots)
    for field in dataclasses.fields(Activations):
        before, after = getattr(sent, field.name), getattr(received, field.name)
        assert (before is None) == (after is None), field.name
        if before is not None:
            assert torch.equal(before, after)


def test_shapes_under_sequence_parallelism_are_one_ranks_part(tiny_run: RunConfig) -> None:
    """Two rows of 64 tokens, images of 5 vision tokens and 4 latents, over 4 ranks."""
    config = dataclasses.replace(
        tiny_run, parallel=ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    )
    assert boundary_shape("vision.1", config, 3) == (4, 1, 32)  # 15 tokens, padded to 16
    assert boundary_shape("pool", config, 0) == (2, 1, 32)  # one blank slot: 5 tokens, padded to 8
    assert boundary_shape("language.embed", config, 3) == (3 * 4 + 3, 1, 32)  # latents are not split
    assert boundary_shape("language.0", config, 3) == (128 // 4 + 3, 1, 32)
    assert boundary_shape("heads", config, 0) == (128 // 4 + 1, 1, 32)


def test_shapes_under_context_parallelism_are_one_ranks_images_and_positions(tiny_run: RunConfig) -> None:
    """Two rows of 64 tokens over 4 ranks, of which each splits its 32 positions over 2 tensor-parallel ranks."""
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=4)
    config = dataclasses.replace(tiny_run, parallel=parallel)
    # Of 6 images, ranks encode 1, 2, 1, 2; of 1 image, one rank encodes it and the others too, for nothing.
    assert [boundary_shape("pool", config, 6, rank) for rank in range(4)] == [(3, 1, 32), (5, 1, 32)] * 2
    assert [boundary_shape("language.embed", config, 6, rank)[0] for rank in range(4)] == [5, 10, 5, 10]
    assert [boundary_shape("language.1", config, 6, rank)[0] for rank in range(4)] == [17, 18, 17, 18]
    assert {boundary_shape("heads", config, 1, rank) for rank in range(4)} == {(17, 1, 32)}


def test_pooled_latents_take_the_dtype_of_what_they_travel_with() -> None:
    sent = Activations(hidden_T1H=torch.zeros(4, 1, 2, dtype=torch.bfloat16), pooled_ND=torch.ones(1, 2))
    assert pack(sent).dtype == torch.bfloat16


def test_embedding_ranks_are_those_of_token_table_and_heads(tiny_run: RunConfig) -> None:
    def ranks(*cuts: str) -> list[int]:
        config = _cut(tiny_run, cuts)
        return embedding_ranks(cut_line(config), [10 * stage for stage in range(len(cuts) + 1)])

    assert ranks() == [0]
    assert ranks("vision.1") == [10]
    assert ranks("pool", "language.1") == [10, 20]
    assert ranks("language.embed", "language.0", "heads") == [10, 30]


def test_embedding_ranks_when_a_rank_holds_every_second_stage(tiny_run: RunConfig) -> None:
    def ranks(*cuts: str) -> list[int]:
        return embedding_ranks(cut_line(_cut(tiny_run, cuts)), [10, 20])

    assert ranks("vision.1", "pool", "language.1") == [10, 20]
    assert ranks("pool", "language.embed", "heads") == [10, 20]
    assert ranks("language.embed", "language.0", "heads") == [20]
    assert ranks("vision.1", "pool", "language.embed") == [20]


def _stages(config: RunConfig, runtime: Runtime) -> list[PipelineStage]:
    schedule = language_transformer_config(config.language, runtime)
    return [PipelineStage(config, stage, runtime, schedule) for stage in cut_line(config)]


def test_stages_that_hold_the_tied_matrix_have_it(config: RunConfig, runtime: Runtime) -> None:
    def names(config: RunConfig) -> list[str | None]:
        return [
            next((name for name, p in stage.model.named_parameters() if p is stage.tied_weight), None)
            for stage in _stages(config, runtime)
        ]

    config = _cut(config, ("language.embed", "language.1", "heads"))
    assert names(config) == [None, TIED, None, "language.output_projection.weight"]
    untied = dataclasses.replace(config, language=dataclasses.replace(config.language, tie_embeddings=False))
    assert names(untied) == [None] * 4


def test_both_copies_of_the_tied_matrix_on_a_rank_get_the_sum_of_their_gradients(
    config: RunConfig, runtime: Runtime
) -> None:
    stages = _stages(_cut(config, ("language.embed", "language.1", "heads")), runtime)
    copies = [weight for stage in stages if (weight := stage.tied_weight) is not None]
    for value, copy in zip((2.0, 5.0), copies, strict=True):
        copy.main_grad = torch.full_like(copy, value)  # type: ignore[attr-defined]
    sum_tied_gradients(stages, runtime.collection.embd)
    for copy in copies:
        assert torch.equal(copy.main_grad, torch.full_like(copy, 7.0))  # type: ignore[attr-defined]
    sum_tied_gradients(stages[:1], None)  # has none, and talks to nobody


def test_stage_without_what_it_needs_says_so(config: RunConfig, runtime: Runtime) -> None:
    config = _cut(config, ("language.0",))
    _, last = cut_line(config)
    module = PipelineStage(config, last, runtime, language_transformer_config(config.language, runtime))
    batch: PackedBatch = merge(make_rows(config, BATCHES["images"]))
    with pytest.raises(AssertionError, match="used a part of the model, or an activation, that it does not hold"):
        module(batch, 0)


def test_communicator_refuses_to_receive_from_both_sides(config: RunConfig) -> None:
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    try:
        stage, _ = cut_line(_cut(config, ("pool",)))
        schedule = language_transformer_config(config.language, Runtime(collection=groups.collection))
        communicator = PlannedP2PCommunicator(groups, schedule, [stage], config, [1, 2])
        with pytest.raises(AssertionError, match="receive from one side at a time"):
            communicator._communicate(
                tensor_send_next=None, tensor_send_prev=None, recv_prev=True, recv_next=True, tensor_shape=None
            )
    finally:
        groups.destroy()


def test_shapes_are_in_the_order_in_which_interleaved_stages_receive(config: RunConfig) -> None:
    """Two ranks with two stages each, four micro-batches of 1 to 4 images: the turns of each rank, written out."""
    groups = initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    try:
        stages = cut_line(_cut(config, ("vision.1", "language.embed", "language.1")))
        schedule = language_transformer_config(config.language, Runtime(collection=groups.collection))
        schedule.microbatch_group_size_per_vp_stage = 2

        def shapes(rank: int) -> list[list[tuple[int, int, int]]]:
            communicator = PlannedP2PCommunicator(groups, schedule, stages[rank::2], config, [1, 2, 3, 4])
            return [list(communicator._activations), list(communicator._gradients)]

        def planned(*turns: tuple[str, int]) -> list[tuple[int, int, int]]:
            return [boundary_shape(piece, config, images) for piece, images in turns]

        first, second, third = "vision.1", "language.embed", "language.1"
        assert shapes(0) == [
            planned((second, 1), (second, 2), (second, 3), (second, 4)),
            planned(*[(third, 1), (third, 2), (first, 1), (first, 2), (third, 3), (third, 4), (first, 3), (first, 4)]),
        ]
        assert shapes(1) == [
            planned(*[(first, 1), (first, 2), (third, 1), (third, 2), (first, 3), (first, 4), (third, 3), (third, 4)]),
            planned((second, 1), (second, 2), (second, 3), (second, 4)),
        ]
    finally:
        groups.destroy()


def test_every_piece_can_begin_a_stage(config: RunConfig) -> None:
    for piece in line_of_pieces(config.vision, config.language)[1:]:
        rows, one, width = boundary_shape(piece, config, 2)
        assert rows > 0
        assert one == 1
        assert width in (config.vision.hidden_size, config.language.hidden_size)
    with pytest.raises(ConfigError):
        cut_line(_cut(config, ("nothing",)))
