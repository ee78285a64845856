"""What all ranks agree on before a step. Oracle: the union of what the ranks reported, written out by hand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lcl_megatron.config import ParallelConfig, RunConfig
from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel.agreement import StepFlags, agree
from lcl_megatron.parallel.groups import ProcessGroups, initialize
from tests.batches import Document, layout_of, make_rows
from tests.distributed import run_distributed

# Rows of micro-batch m and data-parallel rank d: 2, 1; then 0, 3 images. Images at <BoI> 0 have no context.
ROWS: list[list[Document]] = [[(64, (5, 30))], [(64, (0,))], [(64, ())], [(40, (0, 20)), (24, (3,))]]
FIRST_IMAGE = {(0, 0): 0, (0, 1): 2, (1, 0): 3, (1, 1): 3}


@dataclass(frozen=True)
class Told:
    """What one rank knows after the agreement."""

    coordinates: tuple[int, int, int]
    image_ok: np.ndarray
    own_ok: list[np.ndarray]
    images: list[np.ndarray | None]
    num_pairs: int
    num_bad: int
    stop: bool
    pair_slots: list[tuple[list[int], list[bool]]]


def _agree(
    rank: int, world_size: int, config: RunConfig, bad: dict[tuple[int, int, int], list[tuple[int, int]]], stops: int
) -> Told:
    """``bad``: (dp, tp or cp, pp rank) -> (micro-batch, image) that this rank alone could not decode."""
    groups = initialize(config.parallel, lambda pipeline: pipeline[:1])
    coordinates = groups.dp_rank, max(groups.tp_rank, groups.cp_rank), groups.pp_rank
    batch = _step(config, groups, bad.get(coordinates, []))
    agreed = agree(batch, groups, StepFlags(stop=rank == stops))
    assert agreed.step == batch.step
    slots = [agreed.pair_slots([m]) for m in (0, 1)]
    return Told(
        coordinates,
        agreed.image_ok,
        [micro_batch.image_ok.numpy() for micro_batch in agreed.micro_batches],
        [None if m.images is None else m.images.numpy() for m in agreed.micro_batches],
        agreed.num_pairs,
        agreed.num_bad_images,
        agreed.flags.stop,
        [(list(s.num_slots), s.is_pair.tolist()) for s in slots],
    )


def _step(config: RunConfig, groups: ProcessGroups, bad: list[tuple[int, int]]) -> StepBatch:
    rows = make_rows(config, ROWS)
    grid = [rows[:2], rows[2:]]
    own = [ranks[groups.dp_rank] for ranks in grid]
    for micro_batch, image in bad:
        image_ok = own[micro_batch].image_ok.clone()
        image_ok[image] = False
        own[micro_batch] = own[micro_batch].with_image_ok(image_ok)
    if groups.pp_rank > 0:
        own = [dataclasses.replace(batch, images=None) for batch in own]
    return StepBatch(7, layout_of(grid), tuple(own))


LAYOUTS = {
    "dp2 x tp2": ParallelConfig(tensor_model_parallel_size=2),
    "dp2 x pp2": ParallelConfig(pipeline_model_parallel_size=2),
    "dp2 x cp2": ParallelConfig(context_parallel_size=2),
}


@pytest.mark.parametrize("parallel", LAYOUTS.values(), ids=LAYOUTS)
def test_image_that_one_rank_could_not_decode_is_bad_for_all(parallel: ParallelConfig, tiny_run: RunConfig) -> None:
    config = dataclasses.replace(tiny_run, parallel=parallel)
    # Image 1 of (micro-batch 0, dp 0), and images 1 and 2 of (micro-batch 1, dp 1), each seen by one rank only.
    copies = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    bad = {(0, 0, 0): [(0, 1)], (1, copies - 1, 0): [(1, 1), (1, 2)]}
    rows = make_rows(config, ROWS)
    for told in run_distributed(_agree, 4, config, bad, -1):
        assert told.image_ok.tolist() == [True, False, True, True, False, False]
        assert told.num_bad == 3
        # Contexts: images 0, 1 of the first row; 1 and 2 of the last. Only the first is left.
        assert told.num_pairs == 1
        assert told.pair_slots == [([2, 1], [True, False, False]), ([1, 3], [False, False, False, False])]
        assert not told.stop
        dp, _, pp = told.coordinates
        for m, (own_ok, images) in enumerate(zip(told.own_ok, told.images, strict=True)):
            row = rows[2 * m + dp]
            count = row.num_images
            first = FIRST_IMAGE[m, dp]
            assert own_ok.tolist() == (told.image_ok[first : first + count].tolist() or [False])
            if pp > 0:
                assert images is None
                continue
            for ok, pixels, original in zip(own_ok, images, row.images.numpy(), strict=True):
                blank = np.broadcast_to(np.array(BLANK_PIXEL, dtype=np.uint8)[:, None, None], pixels.shape)
                np.testing.assert_array_equal(pixels, original if ok else blank)


@pytest.mark.parametrize("rank", [0, 3])
def test_one_rank_asked_to_stop_stops_all(rank: int, tiny_run: RunConfig) -> None:
    config = dataclasses.replace(tiny_run, parallel=LAYOUTS["dp2 x tp2"])
    assert [told.stop for told in run_distributed(_agree, 4, config, {}, rank)] == [True] * 4


def test_without_failures_nothing_changes(tiny_run: RunConfig) -> None:
    for told in run_distributed(_agree, 2, tiny_run, {}, -1):
        assert told.image_ok.all()
        assert told.num_bad == 0
        assert told.num_pairs == 4
        assert told.pair_slots == [([2, 1], [True, True, False]), ([1, 3], [False, False, True, True])]


def test_step_without_any_image_agrees(tiny_run: RunConfig) -> None:
    def alone(rank: int, world_size: int) -> tuple[int, int, list[int], list[bool]]:
        groups = initialize(tiny_run.parallel, lambda pipeline: pipeline[:1])
        rows = make_rows(tiny_run, [[(64, ())], [(30, ())]])
        batch = StepBatch(0, layout_of([rows]), (rows[groups.dp_rank],))
        agreed = agree(batch, groups)
        assert torch.equal(agreed.micro_batches[0].image_ok, torch.tensor([False]))
        slots = agreed.pair_slots([0])
        return agreed.num_pairs, agreed.num_bad_images, list(slots.num_slots), slots.is_pair.tolist()

    assert run_distributed(alone, 2) == [(0, 0, [1, 1], [False, False])] * 2
