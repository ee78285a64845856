"""CPU stand-ins for megatron-core. Oracle: each stand-in's megatron-core path works with all stand-ins and fails when
that one alone is left out. Values are closed forms; random numbers are those of torch's own generator.

The paths run in processes forked from a server that has imported megatron-core and installed nothing.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from lcl_megatron.parallel import cpu_host
from tests.distributed import run_distributed
from tests.parallel import megatron_paths as paths

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU host does nothing where there is a GPU")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.parallel.megatron_paths", "lcl_megatron.parallel.cpu_host"])

CORE = "megatron.core"
PATHS: dict[str, Callable[..., Any]] = {
    "torch.cuda.current_device": paths.make_layer,
    "torch.cuda.synchronize": paths.run_timer,
    "torch.cuda.manual_seed": paths.draw_random_numbers,
    "torch.cuda.get_rng_state": paths.draw_random_numbers,
    f"{CORE}.tensor_parallel.random._get_cuda_rng_state": paths.draw_random_numbers,
    f"{CORE}.tensor_parallel.random._set_cuda_rng_state": paths.draw_random_numbers,
    f"{CORE}.tensor_parallel.random": paths.draw_without_warning,
    f"{CORE}.pipeline_parallel.schedules.forward_backward_no_pipelining": paths.run_schedule,
    f"{CORE}.pipeline_parallel.schedules.forward_backward_pipelining_without_interleaving": paths.run_pipeline,
    f"{CORE}.pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving": paths.run_interleaved_pipeline,
    f"{CORE}.optimizer.optimizer.MixedPrecisionOptimizer.__init__": paths.update_bf16,
    f"{CORE}.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__": paths.update_bf16,
    f"{CORE}.optimizer.optimizer.FP32Optimizer.__init__": paths.update_fp32,
    f"{CORE}.optimizer.distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups": paths.update_sharded,
    f"{CORE}.optimizer.clip_grads.get_grad_norm_fp32": paths.gradient_norm,
    f"{CORE}.optimizer.clip_grads.clip_grad_by_total_norm_fp32": paths.clip_gradient,
    f"{CORE}.utils.local_multi_tensor_l2_norm": paths.tensor_list_norm,
}


def _run_with_stand_ins(connection: Connection, path: Callable[..., Any], left_out: str | None) -> None:
    """Body of a fresh process: apply all stand-ins but one, run the path, send the error or an empty string."""
    error = ""
    try:
        for stand_in in cpu_host.STAND_INS:
            if stand_in.name != left_out:
                stand_in.apply()
        if path in (paths.run_pipeline, paths.run_interleaved_pipeline):
            run_distributed(path, 2, timeout=60)
        else:
            path()
    except BaseException:
        error = traceback.format_exc()
    connection.send(error)


def _error(path: Callable[..., Any], left_out: str | None) -> str:
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_run_with_stand_ins, args=(theirs, path, left_out))
    process.start()
    theirs.close()
    try:
        assert ours.poll(120), "no answer"
        return ours.recv()
    finally:
        process.kill()
        process.join()


def test_paths_when_listed_cover_every_stand_in():
    assert list(PATHS) == [stand_in.name for stand_in in cpu_host.STAND_INS]
    assert all(stand_in.needed_by for stand_in in cpu_host.STAND_INS)


@pytest.mark.parametrize("path", dict.fromkeys(PATHS.values()), ids=lambda path: path.__name__)
def test_megatron_path_when_all_stand_ins_are_in_place_works(path):
    assert _error(path, left_out=None) == ""


@pytest.mark.parametrize("name", PATHS)
def test_megatron_path_when_its_stand_in_is_missing_fails(name):
    assert "Error" in _error(PATHS[name], left_out=name)


def test_install_when_repeated_changes_nothing_more():
    assert cpu_host.is_installed()  # by conftest.py
    before = torch.cuda.current_device
    cpu_host.install()
    assert torch.cuda.current_device is before


@pytest.mark.parametrize(
    "stand_in",
    [
        cpu_host.Literal("megatron.core.optimizer.clip_grads.gone", "x.py:1"),
        cpu_host.Literal("megatron.core.gone.function", "x.py:1"),
        cpu_host.Literal("megatron.core.utils.divide", "x.py:1"),
        cpu_host.Attribute("megatron.core.utils.gone", "x.py:1", print),
    ],
)
def test_stand_in_when_it_finds_nothing_to_change_says_which_version_fits(stand_in):
    with pytest.raises(RuntimeError, match=rf"{stand_in.name} .*fit megatron-core 0\.16\.1 only"):
        stand_in.apply()
