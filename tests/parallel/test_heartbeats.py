"""The board of heartbeats.

Oracle: what each rank wrote; torch's own stores (the file of the tests, TCP as under a launcher, a lone process's).
"""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lcl_megatron.config import ParallelConfig
from lcl_megatron.parallel.collective_errors import is_collective_error
from lcl_megatron.parallel.groups import ProcessGroups, initialize
from lcl_megatron.parallel.heartbeats import Beat, BoardError, Heartbeats, beat_interval
from tests.distributed import run_distributed


def make_groups() -> ProcessGroups:
    return initialize(ParallelConfig(), lambda pipeline: pipeline[:1])


def test_every_rank_reads_what_every_rank_wrote_last():
    def exchange(rank: int, world_size: int) -> list[Beat]:
        groups = make_groups()
        board = Heartbeats.open(groups, interval=1.0)
        assert [beat.phase for beat in board.read()] == ["start"] * world_size
        groups.barrier()
        for step in range(rank + 1):
            board.write(step, "data", 1.5 * rank)
        groups.barrier()
        return list(board.read())

    expected = [Beat(2, 0, "data", 0.0), Beat(3, 1, "data", 1.5), Beat(4, 2, "data", 3.0)]
    assert run_distributed(exchange, 3) == [expected] * 3


def test_the_default_group_keeps_its_own_patience():
    def timeout(rank: int, world_size: int) -> timedelta:
        Heartbeats.open(make_groups(), interval=1.0)
        return dist.distributed_c10d._get_default_store().timeout

    assert run_distributed(timeout, 2) == [timedelta(minutes=5)] * 2


def test_a_lone_process_has_a_board_of_its_own(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    groups = make_groups()
    try:
        board = Heartbeats.open(groups, interval=1.0)
        board.write(7, "save", 0.25)
        assert board.read() == [Beat(2, 7, "save", 0.2)]
    finally:
        groups.destroy()


def test_tcp_stores_work_and_their_end_is_explained():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=2))
    boards = [Heartbeats(rank, 2, dist.PrefixStore("beats", store.clone()), 1.0) for rank in range(2)]
    for rank, board in enumerate(boards):
        board.write(rank, "agree", 0.0)
    assert [beat.step for beat in boards[0].read()] == [0, 1]
    del server
    for action in (boards[0].read, lambda: boards[0].write(1, "data", 0.0)):
        with pytest.raises(BoardError, match=r"the store of torch\.distributed does not answer, .* may have died"):
            action()


@pytest.mark.parametrize("world_size", [1, 8, 2048, 16384])
def test_all_ranks_together_write_no_more_than_a_store_can_take(world_size):
    assert world_size / beat_interval(2.0, world_size) <= 200
    assert beat_interval(2.0, 8) == 2.0


def test_errors_of_collectives_are_told_from_others():
    assert is_collective_error(dist.DistBackendError("NCCL error: remote process exited"))
    assert not is_collective_error(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    assert not is_collective_error(ConnectionResetError("Connection reset by peer"))

    def fail(rank: int, world_size: int) -> bool:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=0.5))
        found = []
        if rank == 0:
            for _ in range(2):  # the second one finds the connection closed
                try:
                    dist.all_reduce(torch.ones(1), group=group)
                except RuntimeError as error:
                    found.append(is_collective_error(error))
        dist.barrier()
        if rank == 1:
            try:
                dist.all_reduce(torch.ones(1), group=group)
            except RuntimeError as error:
                found.append(is_collective_error(error))
        dist.barrier()
        return found

    assert run_distributed(fail, 2) == [[True, True], [True]]
