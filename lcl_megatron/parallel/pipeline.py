"""Pipeline stages of the model, and what travels between them.

megatron-core's 1F1B schedules, with one stage on a rank or several in turn (interleaved), send one 3-D tensor per
micro-batch from stage to stage. What it holds depends on the piece that the next stage starts with:

| next piece | rows of the tensor | width |
|---|---|---|
| ``vision.I``, ``pool`` | patch features, T_vision (this rank's part) | C |
| ``language.embed`` | image latents, N * L, then pooled latents, N | H |
| ``language.I``, ``heads`` | hidden states, T_language (this rank's part), then pooled latents, N | H |

N and T count this rank's part only: under context parallelism the images that it encodes and the positions that it
holds; under sequence parallelism, of T, the rows that it holds.

Pooled latents are extra rows that no layer touches: they are born at the pool and contrasted on the last stage.
Image counts differ between micro-batches, and so do shapes; every stage knows them from the plan, so none are
exchanged (megatron-core's exchange synchronises the device on every transfer).

Shape letters: N image slots, L latents per image, T flattened tokens, C vision width, H language width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lcl_megatron.config import RunConfig
from lcl_megatron.model.lcl import Activations, LCLModel, LCLOutput
from lcl_megatron.model.line import HEADS, LANGUAGE_EMBED, POOL, Stage
from lcl_megatron.model.parts import present
from lcl_megatron.model.specs import Runtime
from lcl_megatron.parallel.groups import ProcessGroups
from lcl_megatron.parallel.zigzag import encoded_slots

if TYPE_CHECKING:
    from lcl_megatron.data.batch import PackedBatch


def boundary_shape(piece: str, config: RunConfig, num_images: int, cp_rank: int = 0) -> tuple[int, int, int]:
    """Return the shape of what a stage that starts with ``piece`` receives for one micro-batch on one rank.

    Args:
        piece: first piece of the receiving stage.
        config: the run.
        num_images: real images of the micro-batch; a micro-batch without images has one blank slot.
        cp_rank: context-parallel rank, which encodes a part of the images.
    """
    context = config.parallel.context_parallel_size
    slots = len(encoded_slots(max(1, num_images), cp_rank, context))
    ways = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    if piece == POOL or piece.startswith("vision."):
        return -(-slots * config.vision.num_tokens // ways), 1, config.vision.hidden_size
    if piece == LANGUAGE_EMBED:
        return slots * config.vision.num_patches + slots, 1, config.language.hidden_size
    tokens = config.training.micro_batch_size * config.data.seq_length // context
    return tokens // ways + slots, 1, config.language.hidden_size


def pack(activations: Activations) -> Tensor:
    """Return the one tensor (rows, 1, width) that carries a stage's activations."""
    if activations.patches_T1C is not None:
        return activations.patches_T1C
    head = activations.hidden_T1H
    if head is None:
        head = present(activations.latents_NLH).flatten(0, 1)[:, None]
    return torch.cat([head, present(activations.pooled_ND)[:, None].to(head.dtype)])


def unpack(received: Tensor, piece: str, num_encoded: int) -> Activations:
    """Return the activations that a stage starting with ``piece`` finds in a received tensor.

    Args:
        received: (rows, 1, width), as ``pack`` made it.
        piece: first piece of the stage.
        num_encoded: image slots that this rank encodes.
    """
    if piece == POOL or piece.startswith("vision."):
        return Activations(patches_T1C=received)
    head, pooled_ND = received[:-num_encoded], received[-num_encoded:, 0]
    if piece == LANGUAGE_EMBED:
        return Activations(latents_NLH=head[:, 0].unflatten(0, (num_encoded, -1)), pooled_ND=pooled_ND)
    return Activations(hidden_T1H=head, pooled_ND=pooled_ND)


class PipelineStage(MegatronModule):
    """One stage of the model, in the form that megatron-core's schedule, DDP and finalisation expect.

    Parallel: tp and cp inside the model; pp through ``set_input_tensor``, which the schedule calls with what the stage
    before sent.
    """

    def __init__(self, config: RunConfig, stage: Stage, runtime: Runtime, schedule: TransformerConfig) -> None:
        super().__init__(config=schedule)
        self.stage = stage
        self.model = LCLModel(config, runtime, stage)
        self._received: Tensor | None = None
        # What megatron-core asks of a stage.
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = stage.is_first, stage.is_last
        # False: the copies of a tied matrix are found by ``sum_tied_gradients``.
        self.share_embeddings_and_output_weights = False
        self._holds_tied_weight = config.language.tie_embeddings and (stage.has(LANGUAGE_EMBED) or stage.has(HEADS))

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Keep what the stage before sent for the next forward call."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This stage's copy of the tied matrix, if it holds one."""
        return present(self.model.language).vocabulary_weight if self._holds_tied_weight else None

    def forward(self, batch: PackedBatch, step: int, features_only: bool = False) -> Tensor | LCLOutput:
        """Run this stage on one micro-batch; ``features_only`` as in ``LCLModel.forward``.

        Returns:
            ``LCLOutput`` on the last stage, else the tensor for the next stage.
        """
        received = None
        if not self.stage.is_first:
            received = unpack(present(self._received), self.stage.first_piece, batch.num_encoded)
        result = self.model(batch, received, step, features_only)
        return result if isinstance(result, LCLOutput) else pack(result)


class PlannedP2PCommunicator(P2PCommunicator):
    """megatron-core's stage-to-stage transfers, with shapes from the plan.

    A rank receives activations in the order in which it uses them, which is the order of megatron-core's table of
    (micro-batch, stage on the rank) without the first stage of the line; and gradients in the same order with the
    rank's stages reversed. So two counters are all the state there is. A new communicator is made for every step.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        schedule: TransformerConfig,
        stages: Sequence[Stage],
        config: RunConfig,
        images_per_micro_batch: Sequence[int],
    ) -> None:
        super().__init__(pp_group=groups.pp, config=schedule)
        images, group_size = images_per_micro_batch, schedule.microbatch_group_size_per_vp_stage
        table = get_schedule_table(len(images), len(stages), group_size)

        def shapes(pieces: list[tuple[str | None, int]]) -> Iterator[tuple[int, int, int]]:
            return iter([boundary_shape(piece, config, n, groups.cp_rank) for piece, n in pieces if piece])

        self._activations = shapes(
            [(None if stages[chunk].is_first else stages[chunk].first_piece, images[index]) for index, chunk in table]
        )
        self._gradients = shapes([(stages[-1 - chunk].next_piece, images[index]) for index, chunk in table])

    def _communicate(self, *, recv_prev: bool, recv_next: bool, tensor_shape: Any, **kwargs: Any) -> Any:
        assert not (recv_prev and recv_next), "the schedules in use receive from one side at a time"
        if recv_prev:
            tensor_shape = next(self._activations)
        elif recv_next:
            tensor_shape = next(self._gradients)
        return super()._communicate(recv_prev=recv_prev, recv_next=recv_next, tensor_shape=tensor_shape, **kwargs)


def embedding_ranks(stages: Sequence[Stage], pipeline: list[int]) -> list[int]:
    """Return those ranks of a pipeline that hold the token table: the stages with the embedding and with the heads.

    Args:
        stages: all stages of the line; stage i is on rank i modulo the pipeline's length.
        pipeline: global ranks.
    """
    holders = [
        pipeline[index % len(pipeline)]
        for index, stage in enumerate(stages)
        if stage.has(LANGUAGE_EMBED) or stage.has(HEADS)
    ]
    return list(dict.fromkeys(holders))


def sum_tied_gradients(stages: Sequence[PipelineStage], group: dist.ProcessGroup | None) -> None:
    """Give both copies of a tied token matrix the sum of their gradients, so that they stay equal.

    The copies are on two ranks, or in two stages of one. megatron-core's own sum looks for a copy in the first or the
    last stage of a rank, where it need not be. Data-parallel ranks may have summed different parts: with a distributed
    optimizer a copy is a bucket of its own, of which both copies' ranks have the same part.

    Args:
        stages: the stages on this rank, after their reduction over dp.
        group: ranks that hold a copy; read only on those.

    Parallel: one all-reduce over the group.
    """
    copies = [weight for stage in stages if (weight := stage.tied_weight) is not None]
    gradients: list[Tensor] = [copy.main_grad for copy in copies]  # type: ignore[attr-defined]  # DDP sets it
    if not gradients:
        return
    total, *others = gradients
    for other in others:
        total += other
    if group is not None and group.size() > 1:
        dist.all_reduce(total, group=group)
    for other in others:
        other.copy_(total)
