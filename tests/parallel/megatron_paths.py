"""The megatron-core code that each stand-in of the CPU host is there for, run on its own.

Every path raises, or returns an error in words, unless megatron-core does there what it does on a GPU. This module
installs nothing: its caller decides which stand-ins are in place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import ColumnParallelLinear, get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.timers import Timer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import init_method_normal, local_multi_tensor_l2_norm

SEED = 7


def _config(dtype: torch.dtype = torch.float32, **changes: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=4,
        num_attention_heads=1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **changes,
    )


class _Scale(MegatronModule):
    """Multiplies by a (4,) weight; enough of a model for DDP, the optimizers and the schedules."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.weight = torch.nn.Parameter(torch.ones(4, dtype=config.params_dtype))
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, received: Any) -> None:
        self.received = received[0] if isinstance(received, list) else received

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features if self.received is None else self.received) * self.weight


def _alone() -> None:
    """Groups of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def _seeded_tracker() -> Any:
    model_parallel_cuda_manual_seed(SEED, tp_rank=0, ep_rank=0, etp_rank=0)
    return get_cuda_rng_tracker()


def make_layer() -> None:
    """A parallel layer makes its weight on the current device."""
    _alone()
    _seeded_tracker()
    layer = ColumnParallelLinear(4, 8, config=_config(), init_method=init_method_normal(0.02), bias=False)
    assert layer.weight.device.type == "cpu"
    assert 0.005 < float(layer.weight.std()) < 0.04


def run_timer() -> None:
    """A timer waits for the device when it starts and stops."""
    timer = Timer("step")
    timer.start()
    timer.stop()
    assert timer.elapsed() >= 0


def draw_random_numbers() -> None:
    """Tensor-parallel regions draw from the seed 2718 + seed + rank; outside, from the seed itself."""
    torch.manual_seed(99)
    with _seeded_tracker().fork():
        inside = torch.rand(3)
    outside = torch.rand(3)
    for got, seed in ((inside, SEED + 2718), (outside, SEED)):
        assert torch.equal(got, torch.rand(3, generator=torch.Generator().manual_seed(seed)))
    with get_cuda_rng_tracker().fork():  # goes on where the first fork stopped
        assert not torch.equal(torch.rand(3), inside)


def draw_without_warning() -> None:
    """Drawing inside a tensor-parallel region is no reason for a warning."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("megatron.core").addHandler(handler)
    with _seeded_tracker().fork():
        torch.rand(3)
    assert not [record.getMessage() for record in records]


def _train_step(config: TransformerConfig, *chunks: DistributedDataParallel, is_last: bool) -> None:
    def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
        output = model(torch.ones(2, 1, 4, dtype=config.params_dtype))
        return output, lambda out: (out.sum(), torch.tensor(1, dtype=torch.int), {"loss": out.sum().detach()})

    no_sync = [chunk.no_sync for chunk in chunks]
    config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    reports = get_forward_backward_func(
        config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    )(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks),
        model=list(chunks),
        num_microbatches=4,
        seq_length=2,
        micro_batch_size=1,
        forward_only=False,
    )
    assert [float(report["loss"]) for report in reports] == ([8.0] * 4 if is_last else [])
    for chunk in chunks:
        assert chunk.module.weight.main_grad.tolist() == [8.0] * 4


def _wrapped(config: TransformerConfig, use_distributed_optimizer: bool = True) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=use_distributed_optimizer, overlap_grad_reduce=True
    )
    return DistributedDataParallel(config, settings, _Scale(config))


def run_schedule() -> None:
    """Forward and backward of four micro-batches, summed."""
    _alone()
    config = _config(calculate_per_token_loss=True)
    _train_step(config, _wrapped(config), is_last=True)


def run_pipeline(rank: int, world_size: int) -> None:
    """The same through two 1F1B stages. The torch.distributed default group exists already."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    config = _config(calculate_per_token_loss=True, pipeline_model_parallel_size=2)
    _train_step(config, _wrapped(config), is_last=rank == 1)


def run_interleaved_pipeline(rank: int, world_size: int) -> None:
    """The same through four stages that two ranks hold in turn."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    config = _config(
        calculate_per_token_loss=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=2,
        overlap_p2p_comm=True,
        batch_p2p_comm=False,
    )
    _train_step(config, _wrapped(config), _wrapped(config), is_last=rank == 1)


def _optimizer(dtype: torch.dtype, distributed: bool) -> tuple[DistributedDataParallel, MegatronOptimizer]:
    _alone()
    ddp = _wrapped(_config(dtype), distributed)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.5,
        weight_decay=0.0,
        clip_grad=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=distributed,
    )
    return ddp, get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False)


def _update(dtype: torch.dtype, distributed: bool) -> None:
    """The first step of Adam goes the learning rate against the gradient's sign: from 1 to 0.5."""
    ddp, optimizer = _optimizer(dtype, distributed)
    ddp.module.weight.main_grad.fill_(3.0)
    succeeded, _, _ = optimizer.step()
    assert succeeded
    assert ddp.module.weight.tolist() == [0.5] * 4


def update_fp32() -> None:
    """Plain Adam in fp32."""
    _update(torch.float32, distributed=False)


def update_bf16() -> None:
    """Plain Adam with fp32 copies of bf16 parameters."""
    _update(torch.bfloat16, distributed=False)


def update_sharded() -> None:
    """Distributed Adam in fp32."""
    _update(torch.float32, distributed=True)


def gradient_norm() -> None:
    """sqrt(3^2 + 4^2), and 0 on a rank without gradients."""
    _alone()
    gradients = [torch.tensor([3.0]), torch.tensor([4.0])]
    assert float(get_grad_norm_fp32(gradients, grad_stats_parallel_group=dist.group.WORLD)) == 5.0
    assert float(get_grad_norm_fp32([], grad_stats_parallel_group=dist.group.WORLD)) == 0.0


def tensor_list_norm() -> None:
    """The norm of a list of tensors, without Apex."""
    norm, _ = local_multi_tensor_l2_norm(0, torch.zeros(1), [[torch.tensor([3.0]), torch.tensor([4.0])]], False)
    assert norm.tolist() == [5.0]


def clip_gradient() -> None:
    """A gradient of norm 5 clipped to 1."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([parameter], 1.0, 5.0)
    assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8]))
