"""Tiny runs in any layout for tests of checkpoints: how to build one, train it a little, and see its whole tensors.

Whole tensors are put together without the code under test: from each rank's parameters and from megatron-core's
optimizers, by the dimension that tensor parallelism splits.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from lcl_megatron.checkpoint.native import Trainable
from lcl_megatron.config import (
    DataConfig,
    LanguageConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    PoolConfig,
    RunConfig,
    TrainingConfig,
    VisionConfig,
)
from lcl_megatron.data.batch import StepBatch
from lcl_megatron.parallel import engine as engines
from lcl_megatron.parallel.agreement import agree
from lcl_megatron.parallel.groups import ProcessGroups
from lcl_megatron.training.objective import Objective
from lcl_megatron.training.optimizer import build_optimizer, build_scheduler
from tests.batches import layout_of, make_rows

CONFIG = RunConfig(
    vision=VisionConfig(
        image_size=16,
        patch_size=8,
        num_layers=2,
        hidden_size=16,
        ffn_hidden_size=32,
        num_attention_heads=2,
        layer_scale_init=0.5,
        drop_path_rate=0.3,
    ),
    pool=PoolConfig(num_attention_heads=2),
    language=LanguageConfig(
        num_layers=2,
        hidden_size=24,
        ffn_hidden_size=32,
        num_attention_heads=2,
        vocab_size=60,
        max_position_embeddings=64,
        make_vocab_size_divisible_by=16,
    ),
    loss=LossConfig(contrastive_loss_weight=1.0),
    data=DataConfig(seq_length=64, num_workers=0),
    training=TrainingConfig(
        train_iters=4, global_batch_size=4, micro_batch_size=1, precision="fp32", transformer_impl="torch"
    ),
    optimizer=OptimizerConfig(lr=0.01, lr_warmup_iters=1),
)
MOMENTS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Layout:
    """How a run is spread, and what else a checkpoint must be able to cross."""

    name: str
    dp: int = 1
    tp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    cuts: tuple[str, ...] = ()
    stages_per_rank: int = 1
    distributed_optimizer: bool = True

    @property
    def pp(self) -> int:
        return (len(self.cuts) + 1) // self.stages_per_rank

    @property
    def world_size(self) -> int:
        return self.dp * self.tp * self.cp * self.pp

    def apply(self, config: RunConfig) -> RunConfig:
        return dataclasses.replace(
            config,
            parallel=ParallelConfig(
                tensor_model_parallel_size=self.tp,
                context_parallel_size=self.cp,
                sequence_parallel=self.sequence_parallel,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=self.stages_per_rank,
                pipeline_cuts=self.cuts,
                use_distributed_optimizer=self.distributed_optimizer,
            ),
        )


def build(config: RunConfig) -> Trainable:
    return _trainable(config, engines.start(config))


def build_again(config: RunConfig, other: Trainable) -> Trainable:
    """Build a second model on the ranks of a first one."""
    return _trainable(config, other.engine.groups)


def _trainable(config: RunConfig, groups: ProcessGroups) -> Trainable:
    engine = engines.build_engine(config, groups)
    optimizer = build_optimizer(engine)
    return Trainable(engine, optimizer, build_scheduler(config, optimizer))


def train(trainable: Trainable, steps: range) -> None:
    """Train on random rows of one document each, all but one with images."""
    engine, config = trainable.engine, trainable.engine.config
    groups = engine.groups
    for step in steps:
        rows = make_rows(config, [[(40, (3, 20))], [(64, (9,))], [(50, ())], [(60, (0, 30))]], seed=step)
        grid = [rows[i : i + groups.dp_size] for i in range(0, len(rows), groups.dp_size)]
        batch = StepBatch(step, layout_of(grid), tuple(ranks[groups.dp_rank] for ranks in grid))
        agreed = agree(batch, groups)
        engine.zero_gradients()
        trainable.optimizer.zero_grad()
        engine.forward_backward(agreed.micro_batches, Objective(config.loss, agreed, groups), step)
        trainable.scheduler.step(1)
        trainable.optimizer.step()


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one tensor."""

    shape: tuple[int, ...]
    """Shape of the tensor on this tensor-parallel rank."""
    begin: int
    """First entry, in the flattened tensor."""
    values: np.ndarray
    split_dim: int | None
    """Dimension that tensor parallelism splits."""


@dataclass(frozen=True)
class HeldState:
    """What one rank holds."""

    tp_rank: int
    pieces: list[tuple[str, Piece]]
    """By ``KIND/NAME``."""
    adam_steps: list[int]
    counters_are_separate: bool
    """Whether no two parameters share a step counter, which Adam would count up once for each."""
    learning_rate: float


def held_state(trainable: Trainable) -> HeldState:
    """Return this rank's weights and optimizer state."""
    tied = trainable.engine.config.language.tie_embeddings
    pieces, counters = [], []
    names = {}
    for name, parameter in itertools.chain(*(model.named_parameters() for model in trainable.engine.models)):
        if tied and name.startswith("language.output_"):
            name = "language.embedding.word_embeddings.weight"
        names[parameter] = name
        pieces.append((f"weight/{name}", _piece(parameter, 0, parameter)))
    for part in trainable.optimizer.chained_optimizers:
        for parameter, begin, moments in _moments(part, names):
            for kind in MOMENTS:
                values = moments.get(kind, torch.zeros(len(moments["param"].flatten())))
                pieces.append((f"{kind}/{names[parameter]}", _piece(parameter, begin, values)))
        counters += [state["step"] for state in part.optimizer.state.values() if state]
    return HeldState(
        trainable.engine.groups.tp_rank,
        pieces,
        sorted({int(counter) for counter in counters}),
        len({counter.data_ptr() for counter in counters}) == len(counters),
        trainable.optimizer.param_groups[0]["lr"],
    )


def _moments(part: Any, parameters: Iterable[torch.nn.Parameter]) -> Iterator[tuple[torch.nn.Parameter, int, Any]]:
    """Yield each parameter of which this rank holds optimizer state, where that begins, and the state."""
    if isinstance(part, DistributedOptimizer):
        for buckets in part.gbuf_ranges:
            for bucket in next(iter(buckets.values())):
                for parameter, ranges in bucket["param_map"].items():
                    group, order = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[group]["params"][order]
                    yield parameter, ranges["param"].start, {"param": main, **part.optimizer.state[main]}
    else:
        for parameter in parameters:
            main = getattr(parameter, "main_param", parameter)
            yield parameter, 0, {"param": main, **part.optimizer.state[main]}


def _piece(parameter: torch.nn.Parameter, begin: int, values: torch.Tensor) -> Piece:
    split = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
    # numpy has no bfloat16; float32 holds it exactly.
    return Piece(tuple(parameter.shape), begin, values.detach().float().flatten().numpy().copy(), split)


def whole_state(ranks: list[HeldState]) -> dict[str, np.ndarray]:
    """Return every tensor of the model and its optimizer; what several ranks hold must be the same bits."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    split_dims: dict[str, int | None] = {}
    for rank in ranks:
        for name, piece in rank.pieces:
            split_dims[name] = piece.split_dim
            by_tp = parts.setdefault(name, {})
            key = 0 if piece.split_dim is None else rank.tp_rank
            flat = by_tp.setdefault(key, np.full(piece.shape, np.nan, dtype=np.float32)).reshape(-1)
            held = flat[piece.begin : piece.begin + len(piece.values)]
            known = ~np.isnan(held)
            np.testing.assert_array_equal(held[known], piece.values[known], err_msg=f"copies of {name} differ")
            held[:] = piece.values
    whole = {
        name: np.concatenate([by_tp[rank] for rank in sorted(by_tp)], axis=split_dims[name] or 0)
        for name, by_tp in parts.items()
    }
    missing = [name for name, values in whole.items() if np.isnan(values).any()]
    assert not missing, f"no rank holds some entries of {missing}"
    return whole


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
