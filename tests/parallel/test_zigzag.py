"""The division of rows over ranks. Oracles: chunks written out by hand; a list of positions, one by one, in Python.

``megatron.core.utils.get_batch_on_this_cp_rank`` divides rows in the same way and is asked too.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.testing._internal.distributed.fake_pg import FakeStore

from lcl_megatron.parallel.zigzag import ZigZag, encoded_slots, images_of

SHAPES = [(1, 8, 1), (2, 8, 3), (2, 4, 1), (3, 12, 2), (4, 64, 2), (8, 32, 3)]
"""Ranks, positions of a row, rows."""


def _held(size: int, row_length: int, num_rows: int, rank: int) -> list[int]:
    """Flat positions that a rank holds, in its order."""
    chunk = row_length // (2 * size)
    return [
        row * row_length + part * chunk + i
        for row in range(num_rows)
        for part in (rank, 2 * size - 1 - rank)
        for i in range(chunk)
    ]


def _borders(seed: int, row_length: int, num_rows: int) -> list[int]:
    """Borders of random documents; rows begin with a new one."""
    draw = random.Random(seed)
    inner = draw.sample(range(row_length * num_rows), draw.randrange(row_length * num_rows))
    return sorted({*inner, *range(0, row_length * num_rows + 1, row_length)})


def test_four_chunks_of_two_ranks_by_hand() -> None:
    split = ZigZag(2, 8)
    assert [split.take(torch.arange(16).view(2, 8), rank).tolist() for rank in (0, 1)] == [
        [[0, 1, 6, 7], [8, 9, 14, 15]],
        [[2, 3, 4, 5], [10, 11, 12, 13]],
    ]


@pytest.mark.parametrize(("size", "row_length", "num_rows"), SHAPES)
def test_taken_entries_are_those_that_owner_and_local_say(size: int, row_length: int, num_rows: int) -> None:
    split, positions = ZigZag(size, row_length), torch.arange(num_rows * row_length)
    owner, local = split.owner(positions), split.local(positions)
    for rank in range(size):
        held = _held(size, row_length, num_rows, rank)
        assert split.take(positions.view(num_rows, row_length), rank).flatten().tolist() == held
        assert (owner == rank).nonzero()[:, 0].tolist() == sorted(held)
        assert local[held].tolist() == list(range(len(held)))
    # Put together again, every position is there once.
    taken = torch.cat([split.take(positions.view(num_rows, -1), rank).flatten() for rank in range(size)])
    assert torch.equal(taken[owner * (len(positions) // size) + local], positions)


@pytest.mark.parametrize(("size", "row_length", "num_rows"), SHAPES)
def test_megatron_core_divides_rows_in_the_same_way(size: int, row_length: int, num_rows: int) -> None:
    values = torch.arange(num_rows * row_length).view(num_rows, row_length)
    for rank in range(size):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            theirs = get_batch_on_this_cp_rank({"tokens": values}, cp_group=torch.distributed.group.WORLD)["tokens"]
        finally:
            torch.distributed.destroy_process_group()
        assert torch.equal(ZigZag(size, row_length).take(values, rank), theirs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("size", "row_length", "num_rows"), SHAPES)
def test_runs_give_every_query_its_document_up_to_itself(size: int, row_length: int, num_rows: int, seed: int) -> None:
    borders = _borders(seed, row_length, num_rows)
    begin_of = np.repeat(borders[:-1], np.diff(borders))
    gathered = [position for rank in range(size) for position in _held(size, row_length, num_rows, rank)]
    split = ZigZag(size, row_length)
    for rank in range(size):
        runs = split.runs(torch.tensor(borders, dtype=torch.int32), rank)
        assert runs.query_borders.dtype == runs.key_borders.dtype == torch.int32
        assert runs.query_borders.diff().tolist() == [queries for queries, _ in runs.lengths]
        assert runs.key_borders.diff().tolist() == [keys for _, keys in runs.lengths]
        seen = []
        for (queries, keys), first in zip(runs.lengths, runs.key_borders.tolist(), strict=False):
            for query in range(queries):
                # Causal from the bottom right: the last query sees all keys of its run.
                rows = runs.key_rows[first : first + keys - (queries - 1 - query)]
                seen.append([gathered[row] for row in rows.tolist()])
        expected = [list(range(begin_of[q], q + 1)) for q in _held(size, row_length, num_rows, rank)]
        assert seen == expected


@pytest.mark.parametrize("size", [2, 3, 8])
def test_causal_attention_over_whole_rows_costs_all_ranks_the_same(size: int) -> None:
    row_length = 48
    runs = [ZigZag(size, row_length).runs(torch.tensor([0, row_length], dtype=torch.int32), r) for r in range(size)]
    scores = [sum(q * k - q * (q - 1) // 2 for q, k in part.lengths) for part in runs]
    assert len(set(scores)) == 1
    assert sum(scores) == row_length * (row_length + 1) // 2


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 8, 64])
def test_images_are_divided_evenly_and_nobody_is_idle(num_slots: int, size: int) -> None:
    parts = [images_of(num_slots, rank, size) for rank in range(size)]
    assert [slot for part in parts for slot in part] == list(range(num_slots))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for rank, part in enumerate(parts):
        encoded = encoded_slots(num_slots, rank, size)
        assert list(encoded) == (list(part) or [num_slots - 1])


def test_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 10 positions cannot be cut into 4 equal chunks") as refusal:
        ZigZag(2, 10)
    assert "choose a multiple of 4" in str(refusal.value)
