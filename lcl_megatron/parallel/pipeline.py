"""Pipeline stages of the model, and what travels between them.

megatron-core's 1F1B schedule sends one 3-D tensor per micro-batch from stage to stage. What it holds depends on the
piece that the next stage starts with:

| next piece | rows of the tensor | width |
|---|---|---|
| ``vision.I``, ``pool`` | patch features, T_vision (this rank's part) | C |
| ``language.embed`` | image latents, N * L, then pooled latents, N | H |
| ``language.I``, ``heads`` | hidden states, T_language (this rank's part), then pooled latents, N | H |

N and T are this rank's part: the images that it encodes and the positions that it holds under context parallelism, of
T its rows under sequence parallelism.

Pooled latents are extra rows that no layer touches: they are born at the pool and contrasted on the last stage.
Image counts differ between micro-batches, and so do shapes; every stage knows them from the plan, so none are
exchanged (megatron-core's exchange synchronises the device on every transfer).

Shape letters: N image slots, L latents per image, T flattened tokens, C vision width, H language width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

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
    """The model's part on this rank, in the form that megatron-core's schedule, DDP and finalisation expect.

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
        holds_tied_weight = stage.has(LANGUAGE_EMBED) or stage.has(HEADS)
        self.share_embeddings_and_output_weights = config.language.tie_embeddings and holds_tied_weight

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Keep what the stage before sent for the next forward call."""
        self._received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def shared_embedding_or_output_weight(self) -> Tensor:
        """Return this stage's copy of the tied matrix; its gradient is summed over the embedding group."""
        return present(self.model.language).vocabulary_weight

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

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the stage's tensors for a distributed checkpoint, named as in the whole model."""
        return self.model.sharded_state_dict(prefix, sharded_offsets, metadata)


class PlannedP2PCommunicator(P2PCommunicator):
    """megatron-core's stage-to-stage transfers, with shapes from the plan.

    The schedule receives activations, and gradients, in the order of the micro-batches; so two counters are all the
    state there is. A new communicator is made for every step.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        schedule: TransformerConfig,
        stage: Stage,
        config: RunConfig,
        images_per_micro_batch: Sequence[int],
    ) -> None:
        super().__init__(pp_group=groups.pp, config=schedule)

        def shapes(piece: str | None) -> Iterator[tuple[int, int, int]]:
            images = images_per_micro_batch if piece else []
            return iter([boundary_shape(piece or "", config, n, groups.cp_rank) for n in images])

        self._activations = shapes(None if stage.is_first else stage.first_piece)
        self._gradients = shapes(stage.next_piece)

    def _communicate(self, *, recv_prev: bool, recv_next: bool, tensor_shape: Any, **kwargs: Any) -> Any:
        assert not (recv_prev and recv_next), "the non-interleaved schedule receives from one side at a time"
        if recv_prev:
            tensor_shape = next(self._activations)
        elif recv_next:
            tensor_shape = next(self._gradients)
        return super()._communicate(recv_prev=recv_prev, recv_next=recv_next, tensor_shape=tensor_shape, **kwargs)


def embedding_ranks(stages: Sequence[Stage], pipeline: list[int]) -> list[int]:
    """Return those ranks of a pipeline that hold the token table: the stages with the embedding and with the heads."""
    return [rank for rank, stage in zip(pipeline, stages, strict=True) if stage.has(LANGUAGE_EMBED) or stage.has(HEADS)]
