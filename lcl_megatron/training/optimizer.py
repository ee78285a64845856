"""AdamW and its schedule, on megatron-core's optimizers."""

from __future__ import annotations

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from lcl_megatron.config import RunConfig
from lcl_megatron.parallel.engine import Engine


def build_optimizer(engine: Engine) -> MegatronOptimizer:
    """Return AdamW with float32 state, sharded over dp if ``use_distributed_optimizer``.

    Weight decay spares every 1-D parameter: biases, LayerNorm, LayerScale, class token, query, ``logit_scale``.
    """
    settings, parallel = engine.config.optimizer, engine.config.parallel
    bf16 = engine.config.training.precision == "bf16"
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # Last stage first: megatron-core 0.16.1's distributed optimizer puts float32 parameters before bf16 ones, and looks
    # their moments up, for a checkpoint, as if they stood in the order of the stages. ``logit_scale``, of the last
    # stage, is the only one in float32.
    chunks = list(reversed(engine.chunks))
    return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=engine.groups.collection)


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return linear warm-up and cosine decay, counted in optimizer steps."""
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=settings.lr_decay_iters or config.training.train_iters,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A continued run takes the step from the checkpoint and everything else from its own configuration.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
