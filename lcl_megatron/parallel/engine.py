"""The model on all ranks: each rank's stages inside megatron-core's DDP, run by megatron-core's 1F1B schedules."""

from __future__ import annotations

import dataclasses
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
from lcl_megatron.parallel.pipeline import PipelineStage, PlannedP2PCommunicator, embedding_ranks, sum_tied_gradients
from lcl_megatron.parallel.sequence import TensorParallelSequence
from lcl_megatron.parallel.work_clock import WorkClock

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
    chunks: tuple[DistributedDataParallel, ...]
    """The stages on this rank, in the order of the line, each inside megatron-core's data parallelism: gradients are
    summed over dp x cp. One, unless stages are interleaved."""
    device: torch.device
    """Where the stages live."""
    rows: RowEdge
    """How positions and images of a micro-batch are shared over cp."""
    work: WorkClock
    """Counts the time of the forward passes."""

    @property
    def models(self) -> tuple[LCLModel, ...]:
        """This rank's parts of the model, one for each stage."""
        return tuple(chunk.module.model for chunk in self.chunks)

    @property
    def model(self) -> LCLModel:
        """This rank's only part of the model; an error where it has several (``models``)."""
        (model,) = self.models
        return model

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Pieces of the model on this rank, stage by stage."""
        return tuple(model.stage for model in self.models)

    @property
    def reads_pixels(self) -> bool:
        """Whether the line of layers begins on this rank."""
        return self.stages[0].is_first

    @property
    def has_losses(self) -> bool:
        """Whether the line of layers ends on this rank."""
        return self.stages[-1].is_last

    def zero_gradients(self) -> None:
        """Empty the gradient buffers; called before each step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def clamp_logit_scale(self) -> None:
        """Keep the temperature within its limits; called after each optimizer step."""
        for model in self.models:
            model.clamp_logit_scale()

    def eval(self) -> None:
        """Switch to evaluation mode: drop-path is off."""
        for chunk in self.chunks:
            chunk.eval()

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

        def forward_step(batches: Any, chunk: DistributedDataParallel) -> tuple[Any, Callable[[Any], Any]]:
            index, micro_batch = next(batches)
            output = self._forward(chunk, micro_batch, step)
            return output, partial(self._loss_and_report, partial(loss_function, index))

        return self._schedule(forward_step, micro_batches, forward_only, whole_gradients)

    def features(self, micro_batches: Sequence[PackedBatch], step: int) -> list[LCLOutput]:
        """Run all micro-batches forward, without a graph, for the features that are contrasted.

        Args:
            micro_batches: this rank's micro-batches, in order.
            step: optimizer step, seeds drop-path.

        Returns:
            The model's output for each micro-batch on the last stage, without token losses; empty elsewhere.
        """

        def forward_step(batches: Any, chunk: DistributedDataParallel) -> tuple[Any, Callable[[Any], Any]]:
            _, micro_batch = next(batches)
            output = self._forward(chunk, micro_batch, step, features_only=True)
            return output, partial(self._loss_and_report, self._nothing_to_differentiate)

        with torch.no_grad():
            return self._schedule(forward_step, micro_batches, forward_only=True, whole_gradients=False)

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
        Needs the whole line of layers on this rank, in one stage.

        Args:
            micro_batches: this rank's micro-batches, in order.
            make_loss_function: takes the outputs of all micro-batches; returns what ``forward_backward`` calls.
            step: optimizer step, seeds drop-path.
            whole_gradients: as in ``forward_backward``.

        Returns:
            What the loss function reported for each micro-batch.
        """
        (chunk,) = self.chunks
        outputs = [self._forward(chunk, micro_batch, step) for micro_batch in micro_batches]
        loss_function = make_loss_function(outputs)

        def forward_step(batches: Any, _: DistributedDataParallel) -> tuple[Any, Callable[[Any], Any]]:
            index, _micro_batch = next(batches)
            return outputs[index], partial(self._loss_and_report, partial(loss_function, index))

        return self._schedule(forward_step, micro_batches, forward_only=False, whole_gradients=whole_gradients)

    def _schedule(
        self,
        forward_step: Callable[..., Any],
        micro_batches: Sequence[PackedBatch],
        forward_only: bool,
        whole_gradients: bool,
    ) -> list[Any]:
        """Run megatron-core's schedule; return what was reported for each micro-batch on the last stage."""
        images, schedule = [micro_batch.num_images for micro_batch in micro_batches], self.chunks[0].config
        communicator = PlannedP2PCommunicator(self.groups, schedule, self.stages, self.config, images)
        return get_forward_backward_func(self.groups.pp_size, schedule.virtual_pipeline_model_parallel_size)(
            forward_step_func=forward_step,
            # Every stage passes over the micro-batches at its own pace.
            data_iterator=[iter(enumerate(micro_batches)) for _ in self.chunks],
            model=list(self.chunks),
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
        for chunk in self.chunks if overlapped else ():
            chunk.disable_forward_pre_hook(param_sync=True)
        yield
        for chunk in self.chunks if overlapped else ():
            chunk.enable_forward_pre_hook()

    def _forward(self, chunk: DistributedDataParallel, batch: PackedBatch, step: int, **options: bool) -> Any:
        """Run a stage on this rank's part of a micro-batch."""
        with self.work.running():
            return chunk(self._on_device(batch, chunk), step, **options)

    def _on_device(self, micro_batch: PackedBatch, chunk: DistributedDataParallel) -> PackedBatch:
        """Return this rank's part of what a stage reads of a micro-batch; later stages need no copy of its pixels."""
        if not chunk.module.stage.is_first:
            micro_batch = dataclasses.replace(micro_batch, images=None)
        return self.rows.part(micro_batch).to(self.device)

    def _nothing_to_differentiate(self, output: LCLOutput) -> tuple[Tensor, LCLOutput]:
        return torch.zeros((), device=self.device), output

    def _loss_and_report(self, loss_function: LossFunction, output: Any) -> tuple[Tensor, Tensor, Any]:
        loss, report = loss_function(output)
        # The second entry is megatron-core's token count, by which it would divide; our losses are divided already.
        return loss, torch.zeros((), dtype=torch.int, device=loss.device), report


def build_engine(config: RunConfig, groups: ProcessGroups) -> Engine:
    """Build this rank's stages with weights that do not depend on the layout, and wrap them for data parallelism."""
    stages = cut_line(config)[groups.pp_rank :: groups.pp_size]
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
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        grad_reduce_in_fp32=True,
    )
    chunks: list[DistributedDataParallel] = []
    for stage in stages:
        module = PipelineStage(config, stage, runtime, schedule)
        initialize_weights(module.model, config.training.seed, groups.tp_rank, groups.tp_size)
        chunk = DistributedDataParallel(
            schedule,
            settings,
            module.to(groups.device),
            # A later stage's gradients are ready while the earlier ones' are computed: nothing is won by small buckets.
            disable_bucketing=bool(chunks),
            pg_collection=groups.collection,
        )
        chunks.append(chunk.train())
    no_sync = [chunk.no_sync for chunk in chunks]
    schedule.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return Engine(config, groups, tuple(chunks), groups.device, rows, WorkClock(groups.device))


def _schedule_config(config: RunConfig, runtime: Runtime) -> TransformerConfig:
    """Return what megatron-core's schedule, DDP and optimizer read. It describes no layer: widths are formal.

    Context parallelism is not named in it: gradients are summed over the group dp x cp that DDP is given, and losses,
    divided by global counts, need no factor of cp.
    """
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    return TransformerConfig(
        num_layers=parallel.num_stages,
        hidden_size=config.language.hidden_size,
        num_attention_heads=config.language.num_attention_heads,
        params_dtype=runtime.params_dtype,
        pipeline_dtype=runtime.params_dtype,
        bf16=runtime.params_dtype == torch.bfloat16,
        tensor_model_parallel_size=runtime.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size if interleaved else None,
        # A batched transfer would send an activation and a gradient to one rank at once, and with two ranks, where the
        # next is the one before, the receiver could not tell which is which.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
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
    """Finish all reductions of gradients; never divide by megatron-core's token count."""
    finalize_model_grads(model, None, **kwargs)
    sum_tied_gradients([chunk.module for chunk in model], kwargs["pg_collection"].embd)
