"""Stand-ins that let megatron-core 0.16.1 run where there is no GPU.

megatron-core names the CUDA device in its code. On a machine without one, ``install`` changes exactly the places
that a run of this package passes through, so that the real layers, 1F1B schedule and distributed optimizer work on CPU
tensors over gloo; so does megatron-core's own saving, which the fault campaign compares with ours. Where a GPU is
present it changes nothing.

Three kinds of stand-in, none of which costs anything per tensor operation:

- a *literal*: ``"cuda"`` or ``"torch.cuda.FloatTensor"`` inside one megatron-core function becomes its CPU twin;
- an *attribute*: a function of ``torch.cuda`` (which would raise or be queued for ever on a CPU build) or of a
  megatron-core module is replaced;
- a *silence*: a message of megatron-core's that is wrong here is not logged.

Each stand-in names the megatron-core lines that need it, and a test shows that those lines fail without it.
A stand-in that finds nothing to change raises, so that another megatron-core version cannot be half-patched.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor

CPU_LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}


class StandIn(Protocol):
    """One change that megatron-core needs on a machine without a GPU."""

    @property
    def name(self) -> str:
        """Dotted path of what is changed."""

    @property
    def needed_by(self) -> str:
        """megatron-core ``file:lines`` (0.16.1) that fail without it."""

    def apply(self) -> None:
        """Make the change, for the rest of the process."""


@dataclass(frozen=True)
class Literal:
    """CUDA strings among the constants of one megatron-core function become CPU strings."""

    name: str
    needed_by: str

    def apply(self) -> None:
        """Replace the function's code; every reference to the function sees the change."""
        function = _find_function(self.name)
        _set_code(function, _replace_constants(function.__code__), self)


@dataclass(frozen=True)
class Attribute:
    """A module attribute is replaced."""

    name: str
    needed_by: str
    value: Callable[..., Any]

    def apply(self) -> None:
        """Set the attribute; it must exist."""
        module_name, _, attribute = self.name.rpartition(".")
        module = importlib.import_module(module_name)
        if not hasattr(module, attribute):
            raise RuntimeError(_unknown(self.name, "does not exist"))
        setattr(module, attribute, self.value)


@dataclass(frozen=True)
class Silence:
    """One message of a megatron-core logger, wrong where device and host share a generator, is not logged."""

    name: str
    needed_by: str
    message: str

    def apply(self) -> None:
        """Add a filter to the logger."""
        logging.getLogger(self.name).addFilter(lambda record: record.msg != self.message)


def _current_device() -> torch.device:
    """Return the device that ``device=torch.cuda.current_device()`` should mean."""
    return torch.device("cpu")


def _nothing(*_: object, **__: object) -> None:
    """Do nothing: CPU operations are complete when they return."""


def _manual_seed(seed: int) -> None:
    """Seed the CPU generator, which serves as the device's generator."""
    torch.default_generator.manual_seed(int(seed))


def _get_rng_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> Tensor:
    """Return the state of the CPU generator; the arguments matter only to CUDA."""
    return torch.get_rng_state()


def _set_rng_state(new_state: Tensor, device: object = None, graph_safe: bool = False) -> None:
    """Set the state of the CPU generator; the arguments matter only to CUDA."""
    torch.set_rng_state(new_state)


_CORE = "megatron.core"
_RANDOM = f"{_CORE}.tensor_parallel.random"

STAND_INS: tuple[StandIn, ...] = (
    # Every parameter, gradient buffer, gathered activation and pipeline receive buffer is made on this device.
    Attribute(
        "torch.cuda.current_device",
        "tensor_parallel/layers.py:261,552,597,873,899,1197; mappings.py:91-181; "
        "distributed/param_and_grad_buffer.py:783-806; pipeline_parallel/p2p_communication.py:190-321; "
        "dist_checkpointing/strategies/state_dict_saver.py:252",
        _current_device,
    ),
    Attribute(
        "torch.cuda.synchronize",
        "pipeline_parallel/p2p_communication.py:242,398; timers.py:152,165; "
        "dist_checkpointing/strategies/filesystem_async.py:230",
        _nothing,
    ),
    # On a CPU build torch queues these for a CUDA start that never comes: seeds would silently have no effect.
    Attribute("torch.cuda.manual_seed", "tensor_parallel/random.py:237,422", _manual_seed),
    Attribute("torch.cuda.get_rng_state", "tensor_parallel/random.py:235,238", _get_rng_state),
    Attribute(f"{_RANDOM}._get_cuda_rng_state", "tensor_parallel/random.py:250,273,447", _get_rng_state),
    Attribute(f"{_RANDOM}._set_cuda_rng_state", "tensor_parallel/random.py:240,255,277,457", _set_rng_state),
    Silence(_RANDOM, "tensor_parallel/random.py:264-265", "CPU RNG state changed within GPU RNG context"),
    # Token counter of the schedules.
    Literal(f"{_CORE}.pipeline_parallel.schedules.forward_backward_no_pipelining", "schedules.py:596"),
    Literal(
        f"{_CORE}.pipeline_parallel.schedules.forward_backward_pipelining_without_interleaving", "schedules.py:2138"
    ),
    Literal(f"{_CORE}.pipeline_parallel.schedules.forward_backward_pipelining_with_interleaving", "schedules.py:983"),
    # Scalars of the optimizers, and their sorting of parameters by type name.
    Literal(f"{_CORE}.optimizer.optimizer.MixedPrecisionOptimizer.__init__", "optimizer/optimizer.py:473-485"),
    Literal(
        f"{_CORE}.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__", "optimizer/optimizer.py:671-700"
    ),
    Literal(f"{_CORE}.optimizer.optimizer.FP32Optimizer.__init__", "optimizer/optimizer.py:907"),
    Literal(
        f"{_CORE}.optimizer.distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups",
        "optimizer/distrib_optimizer.py:361-436",
    ),
    Literal(f"{_CORE}.optimizer.clip_grads.get_grad_norm_fp32", "optimizer/clip_grads.py:90-115"),
    Literal(f"{_CORE}.optimizer.clip_grads.clip_grad_by_total_norm_fp32", "optimizer/clip_grads.py:167,174"),
    Literal(f"{_CORE}.utils.local_multi_tensor_l2_norm", "utils.py:1207"),
)
"""Everything that ``install`` changes, in order."""

_installed = False


def install() -> None:
    """Apply every stand-in unless a GPU is present; a second call does nothing.

    Imports the megatron-core modules concerned. Not undone: a process is a CPU host until it ends.

    Raises:
        RuntimeError: a stand-in finds nothing to change, i.e. megatron-core is not the version this was written for.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    for stand_in in STAND_INS:
        stand_in.apply()
    _installed = True


def is_installed() -> bool:
    """Return whether this process has been made a CPU host."""
    return _installed


def _find_function(name: str) -> FunctionType:
    """Return the innermost Python function behind a dotted name, without its decorators."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part, None)
        found = inspect.unwrap(getattr(found, "__func__", found))
        if isinstance(found, FunctionType):
            return found
        break
    raise RuntimeError(_unknown(name, "is not a Python function"))


def _replace_constants(code: CodeType) -> CodeType:
    """Return the code with CUDA strings replaced, in nested tuples and functions too."""

    def replace(constant: object) -> object:
        if isinstance(constant, str):
            return CPU_LITERALS.get(constant, constant)
        if isinstance(constant, tuple):
            return tuple(replace(item) for item in constant)
        if isinstance(constant, CodeType):
            return _replace_constants(constant)
        return constant

    return code.replace(co_consts=tuple(replace(constant) for constant in code.co_consts))


def _set_code(function: FunctionType, code: CodeType, stand_in: StandIn) -> None:
    """Give the function new code, which must differ from the old."""
    if code == function.__code__:
        raise RuntimeError(_unknown(stand_in.name, f"has nothing to change at {stand_in.needed_by}"))
    function.__code__ = code


def _unknown(name: str, what: str) -> str:
    """Return the message for a megatron-core that differs from the one these stand-ins were written for."""
    return f"{name} {what}: the CPU stand-ins fit megatron-core 0.16.1 only; install that version"
