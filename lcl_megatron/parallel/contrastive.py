"""The contrastive loss over all data-parallel ranks, exactly, with no gradient of features on the wire.

Each rank gathers all features once, streams over them for its own rows, gathers two floats per slot (the
log-sum-exp of both directions), and can then compute the whole gradient of its own features alone: what other
ranks' losses contribute depends only on their features and log-sum-exps, which it has. Memory is the gathered
features and one tile of scores, whatever the global batch. The equations are in ``losses/infonce.py``.

Where ranks say what their slots show (``SlotIdentity``), slots that show the same are counted and, if asked for, not
taken for each other's negatives; hashes of 16 bytes per slot are gathered for it (``losses/false_negatives.py``).

Shape letters: N slots of this rank, G slots of all ranks with padding, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_megatron.data.slot_hashes import EMPTY_CONTEXT
from lcl_megatron.losses.false_negatives import LeftOut, SlotClasses, alone_unless, find_classes
from lcl_megatron.losses.infonce import streamed_gradient, streamed_lse
from lcl_megatron.parallel.collectives import gather_rows, pad_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lcl_megatron.config import LossConfig
    from lcl_megatron.data.batch import PackedBatch


@dataclass(frozen=True)
class PairSlots:
    """The slots that are contrasted together, of one micro-batch or several, on all data-parallel ranks.

    Equal on all ranks, known on the host.
    """

    num_slots: Sequence[int]
    """Slots of each rank of the group. A micro-batch without images may have a blank slot or none."""
    is_pair: Tensor
    """(sum(num_slots),) bool, rank after rank: whether the slot's image and context are contrasted. On the host:
    it is copied to the device of the features."""

    def __post_init__(self) -> None:
        if self.is_pair.dtype != torch.bool or self.is_pair.shape != (sum(self.num_slots),):
            raise ValueError(
                f"is_pair is {self.is_pair.dtype} of shape {tuple(self.is_pair.shape)}; expected bool of "
                f"shape ({sum(self.num_slots)},), one per slot of num_slots = {list(self.num_slots)}"
            )


@dataclass(frozen=True)
class SlotIdentity:
    """What this rank's slots show, and whether slots that show the same are each other's negatives."""

    image_N: Tensor
    """(N,) int64, not negative: equal where the image is the same. Of a slot that is no pair it does not matter."""
    context_N: Tensor
    """(N,) int64, not negative: equal where the context is the same; ``EMPTY_CONTEXT`` where it is empty."""
    mask_same_image: bool = False
    """Leave out of a pair's negatives the other pairs with the same image."""
    mask_same_context: bool = False
    """Leave out of a pair's negatives the other pairs with the same context."""

    def __post_init__(self) -> None:
        for hashes in (self.image_N, self.context_N):
            if hashes.dtype != torch.int64 or hashes.shape != self.image_N.shape or hashes.dim() != 1:
                raise ValueError(
                    f"images are {self.image_N.dtype} of shape {tuple(self.image_N.shape)} and contexts "
                    f"{self.context_N.dtype} of shape {tuple(self.context_N.shape)}; expected int64, one per slot"
                )

    @classmethod
    def of(cls, micro_batches: Sequence[PackedBatch], loss: LossConfig) -> SlotIdentity | None:
        """Return the identity of the slots of this rank's micro-batches, one behind the other; None if not known.

        Raises:
            ValueError: slots are to be masked, but a micro-batch does not say what its slots show: every pair
                would silently remain a negative.
        """
        hashes = [(batch.image_hashes, batch.context_hashes) for batch in micro_batches]
        images = [image for image, _ in hashes if image is not None]
        contexts = [context for _, context in hashes if context is not None]
        if len(images) == len(contexts) == len(micro_batches):
            return cls(_joined(images), _joined(contexts), loss.mask_same_image, loss.mask_same_context)
        if loss.mask_same_image or loss.mask_same_context:
            raise ValueError(
                f"loss.mask_same_image = {loss.mask_same_image}, loss.mask_same_context = {loss.mask_same_context}, "
                "but the micro-batches have no image_hashes and context_hashes; collate_rows makes them"
            )
        return None


@dataclass(frozen=True)
class Repeats:
    """Pairs of this rank that show what others show, among the pairs of all ranks that are contrasted together."""

    same_image: Tensor
    """() int64, pairs whose image is that of another pair too."""
    same_context: Tensor
    """() int64, pairs whose context is that of another pair too."""
    empty_context: Tensor
    """() int64, pairs whose context holds nothing but special tokens."""
    left_out: Tensor
    """() int64, columns that the masks leave out, summed over this rank's pairs; 0 without masks."""


@dataclass(frozen=True)
class ContrastiveOutput:
    """One rank's share of the loss of all pairs that are contrasted together, as sums over this rank's valid pairs.

    Divide by the pairs of the whole global batch, and sum over contrasts of the step and data-parallel ranks.
    """

    loss_sum: Tensor
    """() float32, sum of ((lse_x - z_ii) + (lse_y - z_ii)) / 2; 0 without pairs. Differentiable."""
    num_pairs: Tensor
    """() int64, valid pairs of this rank."""
    image_hits: Tensor
    """() int64, this rank's images whose most similar context, of all that are compared, is their own."""
    context_hits: Tensor
    """() int64, this rank's contexts whose most similar image, of all that are compared, is their own."""
    images_GD: Tensor
    """(G, D) detached unit features of all ranks' images; meaningful where ``is_pair_G``."""
    contexts_GD: Tensor
    """(G, D) detached unit features of all ranks' contexts; meaningful where ``is_pair_G``."""
    is_pair_G: Tensor
    """(G,) bool, False at padding too."""
    repeats: Repeats | None = None
    """Counts of what occurs more than once; None where the ranks did not say what their slots show."""


def contrastive_loss(
    pooled_ND: Tensor,
    context_ND: Tensor,
    logit_scale: Tensor,
    slots: PairSlots,
    group: ProcessGroup | None,
    tile_size: int,
    identity: SlotIdentity | None = None,
) -> ContrastiveOutput:
    """Return this rank's share of the symmetric InfoNCE loss with negatives from all data-parallel ranks.

    Features are normalised in float32 (float64 if given so), whatever their dtype. Every rank of the group must
    call this, also without slots, and with ``identity`` all or none. Communication: one all-gather of 2 D floats per
    slot, one of 2 floats and, for ``identity``, one of 2 int64 in the forward pass, none in the backward pass.

    Gradients are meant to be *summed* over data-parallel ranks: that of ``pooled_ND`` and ``context_ND`` is the
    derivative of the sum of all ranks' ``loss_sum``; that of ``logit_scale`` is this rank's share of it.
    Slots that are no pair get zero gradients, and their features, NaN included, do not matter.

    Args:
        pooled_ND: (N, D) global latents of this rank's images.
        context_ND: (N, D) context features of the same slots.
        logit_scale: () log of the inverse temperature.
        slots: which slots there are on all ranks of the group.
        group: data-parallel group; None = this process alone. Replicated over tensor-parallel ranks.
        tile_size: columns of the similarity matrix that exist at one time.
        identity: what this rank's slots show; None = not known, nothing is counted and nothing masked.

    Raises:
        ValueError: the features or the identity do not fit ``slots``.
    """
    own = 0 if group is None else group.rank()
    _check_shapes(pooled_ND, context_ND, slots, own, 1 if group is None else group.size())
    _check_identity(identity, slots.num_slots[own])
    is_pair_G = pad_rows(slots.is_pair, slots.num_slots).to(pooled_ND.device, non_blocking=True)
    first = own * max(slots.num_slots)
    is_pair_N = is_pair_G[first : first + pooled_ND.shape[0]]
    images_ND, contexts_ND = _unit(pooled_ND, is_pair_N), _unit(context_ND, is_pair_N)

    local = torch.cat([images_ND.detach(), contexts_ND.detach()], dim=1)
    images_GD, contexts_GD = gather_rows(local, slots.num_slots, group).chunk(2, dim=1)
    repeats, left_out = None, None
    if identity is not None:
        repeats, left_out = _find_repeats(identity, is_pair_G, slots.num_slots, group, first)
    gathered = _Gathered(images_GD, contexts_GD, is_pair_G, slots.num_slots, group, first, tile_size, left_out)
    loss_sum, image_hits, context_hits = _InfoNCE.apply(images_ND, contexts_ND, logit_scale, gathered)
    return ContrastiveOutput(
        loss_sum=loss_sum,
        num_pairs=is_pair_N.sum(),
        image_hits=image_hits,
        context_hits=context_hits,
        images_GD=images_GD,
        contexts_GD=contexts_GD,
        is_pair_G=is_pair_G,
        repeats=repeats,
    )


def _find_repeats(
    identity: SlotIdentity, is_pair_G: Tensor, num_slots: Sequence[int], group: ProcessGroup | None, first: int
) -> tuple[Repeats, LeftOut | None]:
    """Return what of this rank's slots occurs more than once on all ranks, and what is left out of its rows.

    No value is looked at on the host, so the device is not waited for.
    """
    local_N2 = torch.stack([identity.image_N, identity.context_N], dim=1).to(is_pair_G.device, non_blocking=True)
    image_G, context_G = gather_rows(local_N2, num_slots, group).unbind(dim=1)
    images, contexts = (find_classes(alone_unless(is_pair_G, keys_G)) for keys_G in (image_G, context_G))
    wanted = ((images, identity.mask_same_image), (contexts, identity.mask_same_context))
    kinds = tuple(classes for classes, is_wanted in wanted if is_wanted)
    left_out = LeftOut(kinds, first, len(local_N2)) if kinds else None
    own = slice(first, first + len(local_N2))

    def repeated(classes: SlotClasses) -> Tensor:
        return (classes.sizes_G[own] > 1).sum()

    repeats = Repeats(
        same_image=repeated(images),
        same_context=repeated(contexts),
        empty_context=(is_pair_G[own] & (context_G[own] == EMPTY_CONTEXT)).sum(),
        left_out=is_pair_G.new_zeros((), dtype=torch.int64) if left_out is None else left_out.count().sum(),
    )
    return repeats, left_out


@dataclass(frozen=True)
class _Gathered:
    """What a rank knows of all ranks, and how it reads it."""

    images_GD: Tensor
    contexts_GD: Tensor
    is_pair_G: Tensor
    num_slots: Sequence[int]
    group: ProcessGroup | None
    first: int
    """Slot of this rank's first row."""
    tile_size: int
    left_out: LeftOut | None


class _InfoNCE(torch.autograd.Function):
    """Own loss sum and retrieval hits from own unit features; backward gives the gradient of all ranks' losses.

    Own features are 0 at slots that are no pair, so that products of a pair need no mask.
    """

    @staticmethod
    def forward(
        ctx: Any, images_ND: Tensor, contexts_ND: Tensor, logit_scale: Tensor, gathered: _Gathered
    ) -> tuple[Tensor, Tensor, Tensor]:
        is_pair_G, tile, first = gathered.is_pair_G, gathered.tile_size, gathered.first
        left_out = gathered.left_out
        is_pair_N = is_pair_G[first : first + images_ND.shape[0]]
        scale = logit_scale.to(images_ND.dtype).exp()
        image_lse_N, image_best_N = streamed_lse(images_ND, gathered.contexts_GD, is_pair_G, scale, tile, left_out)
        context_lse_N, context_best_N = streamed_lse(contexts_ND, gathered.images_GD, is_pair_G, scale, tile, left_out)
        # Without any pair the sums are log 0; no other slot may carry that value into the backward pass.
        lse_N2 = torch.stack([image_lse_N, context_lse_N], dim=1).masked_fill(~is_pair_N[:, None], 0.0)
        lse_G2 = gather_rows(lse_N2, gathered.num_slots, gathered.group)
        positive_N = scale * (images_ND * contexts_ND).sum(dim=1)
        loss_sum = (0.5 * lse_N2.sum(dim=1) - positive_N).sum()

        slot_N = torch.arange(first, first + images_ND.shape[0], device=images_ND.device)
        hits = [((best_N == slot_N) & is_pair_N).sum() for best_N in (image_best_N, context_best_N)]
        ctx.save_for_backward(images_ND, contexts_ND, logit_scale, lse_G2)
        ctx.gathered = gathered
        ctx.mark_non_differentiable(*hits)
        return loss_sum, hits[0], hits[1]

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        images_ND, contexts_ND, logit_scale, lse_G2 = ctx.saved_tensors
        gathered: _Gathered = ctx.gathered
        own = slice(gathered.first, gathered.first + images_ND.shape[0])
        scale = logit_scale.to(images_ND.dtype).exp()
        image_lse_G, context_lse_G = lse_G2.unbind(dim=1)
        is_pair_G = gathered.is_pair_G
        is_pair_N = is_pair_G[own]
        all_images = gathered.images_GD, image_lse_G, is_pair_G
        all_contexts = gathered.contexts_GD, context_lse_G, is_pair_G
        settings = scale, gathered.tile_size, gathered.left_out
        image_pull_ND = streamed_gradient((images_ND, image_lse_G[own], is_pair_N), all_contexts, *settings)
        context_pull_ND = streamed_gradient((contexts_ND, context_lse_G[own], is_pair_N), all_images, *settings)
        half = 0.5 * grad_loss
        grad_images_ND = half * scale * (image_pull_ND - 2 * contexts_ND)
        grad_contexts_ND = half * scale * (context_pull_ND - 2 * images_ND)
        # This rank's share: of the scores it has, one half from its images and one half from its contexts.
        pulled = (images_ND * image_pull_ND).sum() + (contexts_ND * context_pull_ND).sum()
        grad_scale = half * (0.5 * pulled - 2 * (images_ND * contexts_ND).sum())
        return grad_images_ND, grad_contexts_ND, (grad_scale * scale).to(logit_scale.dtype), None


def _unit(features_ND: Tensor, is_pair_N: Tensor) -> Tensor:
    """Return features of length 1 in at least float32; zeros at slots that are no pair."""
    dtype = torch.promote_types(features_ND.dtype, torch.float32)
    return F.normalize(features_ND.to(dtype).masked_fill(~is_pair_N[:, None], 0.0), dim=-1)


def _check_shapes(pooled_ND: Tensor, context_ND: Tensor, slots: PairSlots, own: int, ranks: int) -> None:
    """Raise ValueError unless the features fit the slots of this rank."""
    if len(slots.num_slots) != ranks:
        raise ValueError(f"num_slots names {len(slots.num_slots)} ranks; the group has {ranks}")
    if pooled_ND.shape != context_ND.shape or pooled_ND.shape[0] != slots.num_slots[own]:
        raise ValueError(
            f"pooled features {tuple(pooled_ND.shape)} and context features {tuple(context_ND.shape)} "
            f"must be equal in shape and have {slots.num_slots[own]} rows, this rank's slots"
        )


def _check_identity(identity: SlotIdentity | None, num_slots: int) -> None:
    """Raise ValueError unless the identity fits the slots of this rank."""
    if identity is not None and len(identity.image_N) != num_slots:
        raise ValueError(f"the identity names {len(identity.image_N)} slots; this rank has {num_slots}")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts one behind the other; a single one as it is, for it may lie in page-locked memory."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
