"""The harness that runs ranks. Oracle: what each rank was told to do, and the process table afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, run_distributed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


def test_results_when_ranks_talk_come_in_rank_order():
    torch.ones(512, 512) @ torch.ones(512, 512)  # torch has worked in the parent before it forks
    offset = torch.tensor(10.0, requires_grad=True)
    (offset * 2).backward()

    def add_ranks(rank: int, world_size: int, factor: int) -> tuple[int, float]:
        assert torch.get_num_threads() == 1
        total = offset.detach() + rank * factor
        dist.all_reduce(total)
        return rank, float(total)

    assert run_distributed(add_ranks, 3, 2) == [(0, 36.0), (1, 36.0), (2, 36.0)]


def test_exception_when_one_rank_raises_names_rank_and_line():
    def fail_on_one(rank: int, world_size: int) -> None:
        if rank == 1:
            raise ValueError("tile 7 is missing")
        dist.barrier()

    with pytest.raises(RankError, match=r"(?s)earliest first:\n\nrank 1:.*fail_on_one.*tile 7 is missing"):
        run_distributed(fail_on_one, 2)


def test_report_when_a_rank_is_killed_names_the_signal():
    def die(rank: int, world_size: int) -> None:
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankError, match="rank 0 died without a report: signal SIGKILL"):
        run_distributed(die, 2)


def test_hung_ranks_when_time_is_up_are_killed_with_their_children(tmp_path):
    def hang(rank: int, world_size: int) -> None:
        child = subprocess.Popen(["sleep", "600"])
        (tmp_path / str(rank)).write_text(f"{os.getpid()} {child.pid}")
        if rank == 1:
            time.sleep(600)

    with pytest.raises(RankError, match="1 of 2 ranks failed.*\n\nrank 1 was still running after 3 s"):
        run_distributed(hang, 2, timeout=3)
    pids = [int(pid) for rank in range(2) for pid in (tmp_path / str(rank)).read_text().split()]
    end = time.monotonic() + 10  # orphans are reaped by whatever is process 1 here
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in pids if _is_alive(pid)]
