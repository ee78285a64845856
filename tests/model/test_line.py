"""The line of pieces and its cuts. Oracles: brute force over all cuts, and sizes counted by hand."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcl_megatron.config import ConfigError, LanguageConfig, ParallelConfig, RunConfig, VisionConfig
from lcl_megatron.model.line import Stage, _balanced_starts, _piece_flops, cut_line, line_of_pieces, whole_model

LINE = ("vision.embed", "vision.0", "vision.1", "pool", "language.embed", "language.0", "language.1", "heads")


def _with(config: RunConfig, stages: int, cuts: tuple[str, ...] = ()) -> RunConfig:
    return dataclasses.replace(config, parallel=ParallelConfig(pipeline_model_parallel_size=stages, pipeline_cuts=cuts))


def test_pieces_stand_in_the_order_of_the_data(tiny_run: RunConfig) -> None:
    assert line_of_pieces(tiny_run.vision, tiny_run.language) == LINE
    (stage,) = cut_line(tiny_run)
    assert stage == whole_model(tiny_run.vision, tiny_run.language) == Stage(LINE, None)
    assert stage.is_first
    assert stage.is_last


def test_named_cuts_give_stages_that_know_what_they_hold(tiny_run: RunConfig) -> None:
    first, second, third, fourth = cut_line(_with(tiny_run, 4, ("vision.1", "language.embed", "heads")))
    assert [s.pieces for s in (first, second, third, fourth)] == [LINE[:2], LINE[2:4], LINE[4:7], LINE[7:]]
    assert [s.next_piece for s in (first, second, third, fourth)] == ["vision.1", "language.embed", "heads", None]
    assert [s.is_first for s in (first, second, third, fourth)] == [True, False, False, False]
    assert [s.is_last for s in (first, second, third, fourth)] == [False, False, False, True]
    assert [s.has_vision for s in (first, second, third, fourth)] == [True, True, False, False]
    assert [s.has_language for s in (first, second, third, fourth)] == [False, False, True, True]
    assert [list(s.layers("vision")) for s in (first, second, third, fourth)] == [[0], [1], [], []]
    assert [list(s.layers("language")) for s in (first, second, third, fourth)] == [[], [], [0, 1], []]
    assert second.first_piece == "vision.1"
    assert second.has("pool")
    assert not first.has("pool")


def test_stage_of_the_pool_alone_belongs_to_the_vision_tower(tiny_run: RunConfig) -> None:
    _, pool, _ = cut_line(_with(tiny_run, 3, ("pool", "language.embed")))
    assert pool.has_vision
    assert not pool.has_language
    assert list(pool.layers("vision")) == []


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (("vision.2",), r"names \['vision\.2'\]; known pieces: vision\.0, vision\.1, pool, language\.embed"),
        (("vision.embed",), r"names \['vision\.embed'\]; known pieces: vision\.0"),
        (("pool", "vision.1"), r"\('pool', 'vision\.1'\) are not in the order of the line: vision\.embed, vision\.0"),
        (("pool", "pool"), r"are not in the order of the line"),
    ],
)
def test_cuts_that_cannot_be_are_refused(cuts: tuple[str, ...], message: str, tiny_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        cut_line(_with(tiny_run, len(cuts) + 1, cuts))


def test_more_stages_than_pieces_are_refused(tiny_run: RunConfig) -> None:
    assert [len(stage.pieces) for stage in cut_line(_with(tiny_run, 8))] == [1] * 8
    with pytest.raises(ConfigError, match="9 pipeline stages for 8 pieces; use at most 8 stages"):
        cut_line(_with(tiny_run, 9))


def test_a_rank_with_several_stages_needs_as_many_cuts(tiny_run: RunConfig) -> None:
    parallel = ParallelConfig(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        pipeline_cuts=("vision.1", "language.embed", "heads"),
    )
    stages = cut_line(dataclasses.replace(tiny_run, parallel=parallel))
    assert stages == cut_line(_with(tiny_run, 4, ("vision.1", "language.embed", "heads")))
    balanced = dataclasses.replace(tiny_run, parallel=dataclasses.replace(parallel, pipeline_cuts=()))
    assert cut_line(balanced) == cut_line(_with(tiny_run, 4))


@given(st.lists(st.integers(0, 20).map(float), min_size=1, max_size=8), st.data())
def test_balanced_cuts_have_the_smallest_largest_stage(costs: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))

    def largest(starts: tuple[int, ...]) -> float:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise([*starts, len(costs)]))

    every = [(0, *cuts) for cuts in itertools.combinations(range(1, len(costs)), stages - 1)]
    starts = _balanced_starts(tuple(costs), stages)
    assert starts in every
    assert largest(starts) == min(map(largest, every))


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_balanced_stages_cover_the_line_and_split_the_larger_tower(stages: int) -> None:
    """ViT-L with OPT-125M: the ViT is most of the work and must span several stages."""
    config = _with(
        RunConfig(
            vision=VisionConfig(
                patch_size=14, num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16
            ),
            language=LanguageConfig(vocab_size=50_000),
        ),
        stages,
    )
    cut = cut_line(config)
    assert len(cut) == stages
    assert tuple(piece for stage in cut for piece in stage.pieces) == line_of_pieces(config.vision, config.language)
    assert [stage.next_piece for stage in cut] == [*(stage.first_piece for stage in cut[1:]), None]
    costs = [sum(_piece_flops(piece, config) for piece in stage.pieces) for stage in cut]
    assert max(costs) < 1.25 * sum(costs) / stages + max(_piece_flops(p, config) for p in cut[0].pieces)
    if stages > 2:
        assert sum(stage.has_vision for stage in cut) > 1


def test_flops_of_the_pieces_are_twice_the_multiplications(tiny_run: RunConfig) -> None:
    """Counted by hand for a row of 64 tokens: 32 latents = 8 images of 5 vision tokens."""
    c, f, h, p = 32, 64, 32, 14
    tokens = 8 * 5
    matrices = {"qkv": c * 3 * c, "proj": c * c, "fc1": c * f, "fc2": f * c}
    attention = 2 * 5 * c  # scores and weighted values, per token
    assert _piece_flops("vision.0", tiny_run) == 2 * tokens * (sum(matrices.values()) + attention)
    # Causal: half of the pairs.
    assert _piece_flops("language.1", tiny_run) == 2 * 64 * (4 * h * h + 2 * h * f + 2 * h * 64 / 2)
    assert _piece_flops("vision.embed", tiny_run) == 2 * tokens * 3 * p * p * c
    assert _piece_flops("pool", tiny_run) == 2 * tokens * (c * h + c * h + h * h)
    assert _piece_flops("heads", tiny_run) == 2 * 32 * h * 128
    assert _piece_flops("language.embed", tiny_run) == 0


def test_pieces_that_are_recomputed_or_left_out_weigh_what_they_execute(tiny_run: RunConfig) -> None:
    """A step is three forward passes, four with recomputation; a subset of 1 - 0.4 of the images in the last layer."""

    def weighed(piece: str, **fields: Any) -> float:
        vision, language = (
            dataclasses.replace(tower, **{k.split("__")[1]: v for k, v in fields.items() if k.startswith(name)})
            for name, tower in (("vision", tiny_run.vision), ("language", tiny_run.language))
        )
        changed = dataclasses.replace(tiny_run, vision=vision, language=language)
        return _piece_flops(piece, changed) / _piece_flops(piece, tiny_run)

    assert weighed("vision.1", vision__recompute_granularity="full") == pytest.approx(4 / 3)
    assert weighed("language.1", vision__recompute_granularity="full") == 1
    assert weighed("language.1", language__recompute_granularity="full") == pytest.approx(4 / 3)
    # One layer of two.
    fields: dict[str, Any] = {"language__recompute_granularity": "full", "language__recompute_num_layers": 1}
    assert weighed("language.1", **fields) == pytest.approx(7 / 6)
    assert weighed("language.1", language__recompute_granularity="selective") == 1
    subset: dict[str, Any] = {"vision__drop_path_mode": "subset", "vision__drop_path_rate": 0.4}
    assert weighed("vision.0", **subset) == 1
    assert weighed("vision.1", **subset) == pytest.approx(0.6)
