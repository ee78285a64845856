"""Own work of a rank. Oracle: sleeps of known length, inside and outside; generous limits, for they only get longer."""

from __future__ import annotations

import time

import pytest
import torch

from lcl_megatron.parallel.work_clock import WorkClock


def test_only_what_happens_inside_is_counted_and_is_taken_once():
    clock = WorkClock(torch.device("cpu"))
    for _ in range(2):
        with clock.running():
            time.sleep(0.05)
    begin = time.perf_counter()
    time.sleep(0.2)
    outside = time.perf_counter() - begin
    taken = clock.take()
    assert taken >= 0.1
    assert clock.take() == 0.0
    with clock.running():
        pass
    assert clock.take() < outside


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock_without_a_wait():
    clock = WorkClock(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    (matrix @ matrix).sum().item()
    begin.record()
    for _ in range(100):
        with clock.running():
            for _ in range(3):
                matrix = matrix @ matrix * 1e-3
    end.record()
    taken = clock.take()
    assert 0.5 * begin.elapsed_time(end) < 1000 * taken <= 1.01 * begin.elapsed_time(end)
