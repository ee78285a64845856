"""What all ranks must agree on before a step: which images could be decoded, and the flags that some rank raises.

Only the ranks that read pixels know which images are bad; every rank must divide by the same counts and leave the same
images out of the contrast. And all ranks must stop, or complete a checkpoint, after the same step. One small reduction
on the host carries it all: one byte per image of the global batch, and one for each of ``StepFlags``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.distributed as dist

from lcl_megatron.data.batch import PackedBatch, StepBatch, StepLayout
from lcl_megatron.parallel.contrastive import PairSlots
from lcl_megatron.parallel.groups import ProcessGroups


@dataclass(frozen=True)
class StepFlags:
    """What a rank tells all ranks at a step; agreed, a flag is raised if it is on some rank."""

    stop: bool = False
    """It was asked to stop: this step is the last."""
    writing: bool = False
    """Its part of a checkpoint is not on disk yet."""
    write_failed: bool = False
    """Its part of a checkpoint could not be written."""


@dataclass(frozen=True)
class AgreedStep:
    """A global batch with the decoding verdict of all ranks."""

    step: int
    """Optimizer step, from 0."""
    layout: StepLayout
    """Counts from the plan."""
    micro_batches: tuple[PackedBatch, ...]
    """This rank's micro-batches; bad images are blank and not ``image_ok``."""
    image_ok: np.ndarray
    """(all images,) bool, ordered as ``layout.has_context``."""
    flags: StepFlags
    """Each raised if it is on some rank."""

    @property
    def num_pairs(self) -> int:
        """Contrastive pairs of the global batch."""
        return int((self.layout.has_context & self.image_ok).sum())

    @property
    def num_bad_images(self) -> int:
        """Images of the global batch that could not be decoded."""
        return int((~self.image_ok).sum())

    def pair_slots(self, micro_batches: Sequence[int]) -> PairSlots:
        """Return which image slots of some micro-batches form contrastive pairs, on every data-parallel rank.

        Slots of a rank are ordered by micro-batch; a micro-batch without images has one blank slot.

        Args:
            micro_batches: their indices, the same on all ranks.
        """
        num_images_MR = self.layout.num_images
        first_image_MR = (np.cumsum(num_images_MR) - num_images_MR.ravel()).reshape(num_images_MR.shape)
        chosen = list(micro_batches)
        images_RM, first_image_RM = num_images_MR[chosen].T, first_image_MR[chosen].T
        slots_RM = np.maximum(images_RM, 1)
        first_slot_RM = (np.cumsum(slots_RM) - slots_RM.ravel()).reshape(slots_RM.shape)
        is_pair = np.zeros(slots_RM.sum(), dtype=bool)
        pairs = self.layout.has_context & self.image_ok
        is_pair[_ranges(first_slot_RM, images_RM)] = pairs[_ranges(first_image_RM, images_RM)]
        return PairSlots(slots_RM.sum(axis=1).tolist(), torch.from_numpy(is_pair))


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return [b, b + 1, ..., b + n - 1] of every begin b and length n, one after the other."""
    begins, lengths = begins.ravel(), lengths.ravel()
    before = np.cumsum(lengths) - lengths
    return np.repeat(begins - before, lengths) + np.arange(lengths.sum())


def agree(batch: StepBatch, groups: ProcessGroups, flags: StepFlags | None = None) -> AgreedStep:
    """Return the step with every rank's decoding failures applied on every rank.

    Args:
        batch: this rank's part of the step.
        groups: process groups.
        flags: of this rank; None = none is raised.

    Parallel: one all-reduce of bytes over all ranks, on the host.
    """
    num_images = len(batch.layout.has_context)
    own_flags = torch.tensor(astuple(flags or StepFlags()), dtype=torch.uint8)
    said = torch.cat([torch.zeros(num_images, dtype=torch.uint8), own_flags])
    ranges = [batch.layout.image_range(m, groups.dp_rank) for m in range(len(batch.micro_batches))]
    for (begin, end), micro_batch in zip(ranges, batch.micro_batches, strict=True):
        said[begin:end] = ~micro_batch.image_ok[: micro_batch.num_images]
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=groups.host)
    image_ok = ~said[:num_images].bool()
    micro_batches = tuple(
        micro_batch.with_image_ok(image_ok[begin:end]) if end > begin else micro_batch
        for (begin, end), micro_batch in zip(ranges, batch.micro_batches, strict=True)
    )
    agreed_flags = StepFlags(*said[num_images:].bool().tolist())
    return AgreedStep(batch.step, batch.layout, micro_batches, image_ok.numpy(), agreed_flags)
