"""The model on all ranks: one stage per rank inside megatron-core's DDP, run by megatron-core's 1F1B schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lcl_megatron.config import RunConfig
from lcl_megatron.data.batch import PackedBatch
from lcl_megatron.model.initialization import initialize_weights
from lcl_megatron.model.lcl import LCLModel, LCLOutput
from lcl_megatron.model.line import Stage, cut_line
from lcl_megatron.model.row_edge import RowEdge, WholeRows
from lcl_megatron.model.sequence_edge import WholeSequence
from lcl_megatron.model.specs import Runtime, resolve_transformer_impl
from lcl_megatron.parallel.context import ContextParallelRows
from lcl_megatron.parallel.groups import ProcessGroups, initialize
from lcl_megatron.parallel.pipeline import PipelineStage, PlannedP2PCommunicator, embedding_ranks
from lcl_megatron.parallel.sequence import TensorParallelSequence

LossFunction = Callable[[Any], tuple[Tensor, Any]]
"""Takes what the last stage's forward step returned; returns the loss to differentiate and what to report."""

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def start(config: RunConfig) -> ProcessGroups:
    """Make the process groups of a run; the language model's first and last stage share the embedding group."""
    return initialize(config.parallel, partial(embedding_ranks, cut_line(config)))


@dataclass(frozen=True)
class Engine:
    """This rank's part of the model, ready to train."""

    config: RunConfig
    """The run."""
    groups: ProcessGroups
    """Process groups and ranks."""
    stage: Stage
    """Pieces of the model on this rank."""
    ddp: DistributedDataParallel
    """The stage inside megatron-core's data parallelism: gradients are summed over dp x cp."""
    device: torch.device
    """Where the stage lives."""
    rows: RowEdge
    """How positions and images of a micro-batch are shared over cp."""

    @property
    def model(self) -> LCLModel:
        """This rank's part of the model."""
        return self.ddp.module.model

    def forward_backward(
        self,
        micro_batches: Sequence[PackedBatch],
        loss_function: Callable[[int, LCLOutput], tuple[Tensor, Any]],
        step: int,
        forward_only: bool = False,
        whole_gradients: bool = False,
    ) -> list[Any]:
        """Run all micro-batches of a step through the pipeline.

        Args:
            micro_batches: this data-parallel rank's micro-batches, in order; all cp ranks give the same.
            loss_function: called on the last stage with the micro-batch index and the model's output; the loss it
                returns is differentiated as it is, i.e. it must be divided by global counts already.
            step: optimizer step, seeds drop-path.
            forward_only: no backward pass.
            whole_gradients: sum gradients on every data-parallel rank, and not only the slice that the rank's
                optimizer needs; for inspection.

        Returns:
            What ``loss_function`` reported for each micro-batch on the last stage; empty elsewhere.
        """
        batches = iter(enumerate(micro_batches))

        def forward_step(iterator: Any, model: DistributedDataParallel) -> tuple[Any, Callable[[Any], Any]]:
            index, micro_batch = next(iterator)
            output = model(self._own_part(micro_batch), step)
            return output, partial(self._loss_and_report, partial(loss_function, index))

        return self._schedule(forward_step, batches, micro_batches, forward_only, whole_gradients)

    def features(self, micro_batches: Sequence[PackedBatch], step: int) -> list[LCLOutput]:
        """Run all micro-batches forward, without a graph, for the features that are contrasted.

        Args:
            micro_batches: this rank's micro-batches, in order.
            step: optimizer step, seeds drop-path.

        Returns:
            The model's output for each micro-batch on the last stage, without token losses; empty elsewhere.
        """
        batches = iter(micro_batches)

        def forward_step(iterator: Any, model: DistributedDataParallel) -> tuple[Any, Callable[[Any], Any]]:
            output = model(self._own_part(next(iterator)), step, features_only=True)
            return output, partial(self._loss_and_report, self._nothing_to_differentiate)

        with torch.no_grad():
            return self._schedule(forward_step, batches, micro_batches, forward_only=True, whole_gradients=False)

    def forward_backward_of_graphs(
        self,
        micro_batches: Sequence[PackedBatch],
        make_loss_function: Callable[[list[LCLOutput]], Callable[[int, LCLOutput], tuple[Tensor, Any]]],
        step: int,
        whole_gradients: bool = False,
    ) -> list[Any]:
        """Run all micro-batches forward, keep their activations, and differentiate them one after the other.

        One backward pass of all micro-batches would add up their gradients in the parameters' dtype; like this they
        are added in float32, and the activations of each are free behind it.
        Needs the whole line of layers on this rank (one pipeline stage).

        Args:
            micro_batches: this rank's micro-batches, in order.
            make_loss_function: takes the outputs of all micro-batches; returns what ``forward_backward`` calls.
            step: optimizer step, seeds drop-path.
            whole_gradients: as in ``forward_backward``.

        Returns:
            What the loss function reported for each micro-batch.
        """
        outputs = [self.ddp(self._own_part(micro_batch), step) for micro_batch in micro_batches]
        loss_function = make_loss_function(outputs)

        def forward_step(iterator: Any, _: DistributedDataParallel) -> tuple[Any, Callable[[Any], Any]]:
            index, output = next(iterator)
            return output, partial(self._loss_and_report, partial(loss_function, index))

        return self._schedule(forward_step, iter(enumerate(outputs)), micro_batches, False, whole_gradients)

    def _schedule(
        self,
        forward_step: Callable[..., Any],
        batches: Iterator[Any],
        micro_batches: Sequence[PackedBatch],
        forward_only: bool,
        whole_gradients: bool,
    ) -> list[Any]:
        """Run megatron-core's schedule; return what was reported for each micro-batch on the last stage."""
        images = [micro_batch.num_images for micro_batch in micro_batches]
        communicator = PlannedP2PCommunicator(self.groups, self.ddp.config, self.stage, self.config, images)
        return get_forward_backward_func(self.groups.pp_size, None)(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.ddp],
            num_microbatches=len(micro_batches),
            # Shapes come from the plan, through the communicator.
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
            force_all_reduce=whole_gradients,
            p2p_communicator=communicator if self.groups.pp_size > 1 else None,
            pg_collection=self.groups.collection,
        )

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Make sure that every rank holds the updated parameters, to save or evaluate between two steps.

        With ``overlap_param_gather``, what other ranks have updated arrives only during the next forward pass.
        """
        overlapped = self.config.parallel.overlap_param_gather
        if overlapped:
            self.ddp.disable_forward_pre_hook(param_sync=True)
        yield
        if overlapped:
            self.ddp.enable_forward_pre_hook()

    def _own_part(self, micro_batch: PackedBatch) -> PackedBatch:
        """Return what this rank reads of a micro-batch, on its device."""
        return self.rows.part(micro_batch).to(self.device)

    def _nothing_to_differentiate(self, output: LCLOutput) -> tuple[Tensor, LCLOutput]:
        return torch.zeros((), device=self.device), output

    def _loss_and_report(self, loss_function: LossFunction, output: Any) -> tuple[Tensor, Tensor, Any]:
        loss, report = loss_function(output)
        # The second entry is megatron-core's token count, by which it would divide; our losses are divided already.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), report


def build_engine(config: RunConfig, groups: ProcessGroups) -> Engine:
    """Build this rank's stage with weights that do not depend on the layout, and wrap it for data parallelism."""
    stage = cut_line(config)[groups.pp_rank]
    device = groups.device
    parallel = config.parallel
    rows = ContextParallelRows(groups, config.data.seq_length) if groups.cp_size > 1 else WholeRows()
    runtime = Runtime(
        collection=groups.collection,
        tensor_parallel_size=groups.tp_size,
        sequence_parallel=parallel.sequence_parallel,
        edge=TensorParallelSequence(groups) if parallel.sequence_parallel else WholeSequence(),
        rows=rows,
        params_dtype=_DTYPES[config.training.precision],
        transformer_impl=resolve_transformer_impl(config.training.transformer_impl),
    )
    schedule = _schedule_config(config, runtime)
    module = PipelineStage(config, stage, runtime, schedule)
    initialize_weights(module.model, config.training.seed, groups.tp_rank, groups.tp_size)
    ddp = DistributedDataParallel(
        schedule,
        DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
            grad_reduce_in_fp32=True,
        ),
        module.to(device),
        pg_collection=groups.collection,
    )
    schedule.no_sync_func = ddp.no_sync
    ddp.train()
    return Engine(config, groups, stage, ddp, device, rows)


def _schedule_config(config: RunConfig, runtime: Runtime) -> TransformerConfig:
    """Return what megatron-core's schedule, DDP and optimizer read. It describes no layer: widths are formal.

    Context parallelism is not named in it: gradients are summed over the group dp x cp that DDP is given, and losses,
    divided by global counts, need no factor of cp.
    """
    stages = config.parallel.pipeline_model_parallel_size
    return TransformerConfig(
        num_layers=stages,
        hidden_size=config.language.hidden_size,
        num_attention_heads=config.language.num_attention_heads,
        params_dtype=runtime.params_dtype,
        pipeline_dtype=runtime.params_dtype,
        bf16=runtime.params_dtype == torch.bfloat16,
        tensor_model_parallel_size=runtime.tensor_parallel_size,
        pipeline_model_parallel_size=stages,
        sequence_parallel=runtime.sequence_parallel,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        # Shapes and order of the transfers are fixed; a device-wide wait after each would only stop the pipeline.
        batch_p2p_sync=False,
        # Sums, not averages, over data-parallel ranks and micro-batches.
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize,
    )


def _finalize(model: list[Any], num_tokens: Tensor | None, **kwargs: Any) -> None:
    """Finish all gradient reductions; never divide by megatron-core's token count."""
    finalize_model_grads(model, None, **kwargs)
