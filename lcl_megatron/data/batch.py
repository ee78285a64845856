"""What a training step reads: micro-batches on this rank, and the layout of the step on all ranks.

Shape letters: B rows, S positions, N image slots (at least 1), K text targets.
A *flat position* is ``row * S + position``: rows lie one behind the other, as in packed (THD) attention.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.config.image import BLANK_PIXEL


@dataclass(frozen=True)
class AttentionRuns:
    """What the positions that one context-parallel rank holds attend to: runs of queries, each with a run of keys.

    A run of queries is a stretch of one document that lies within one chunk of the rank's positions. Its keys go from
    the document's begin to the run's end, so the last query of a run sees all of its keys, the one before all but one,
    and so on: attention that is causal from the bottom right. Runs of queries follow each other as the rank holds its
    positions; runs of keys are laid out in the same order.
    """

    query_borders: Tensor
    """(runs + 1,) int32, borders of the runs among the rank's positions."""
    key_borders: Tensor
    """(runs + 1,) int32, borders of the runs of keys."""
    key_rows: Tensor
    """(keys,) int64, row of each key among the keys of all context-parallel ranks, rank after rank."""
    lengths: tuple[tuple[int, int], ...]
    """Queries and keys of each run: the borders, for the host."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> AttentionRuns:
        """Return the runs with every tensor on ``device``."""
        queries, keys, rows = (
            tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.query_borders, self.key_borders, self.key_rows)
        )
        return AttentionRuns(queries, keys, rows, self.lengths)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch on one data-parallel rank.

    Context-parallel ranks share a micro-batch. What each needs of it differs in the fields that say so; all positions
    are those of the whole rows on every one of them.

    A micro-batch without images still has one image slot (N = 1), a blank one with ``num_images = 0``:
    the encoder's parameters then receive zero gradients, so that no data-parallel rank waits for them.
    """

    tokens: Tensor
    """(B, S) int64; positions of image latents hold the image id."""
    labels: Tensor
    """(B, S) int64, the next token; 0 where ``loss_mask`` is False."""
    loss_mask: Tensor
    """(B, S) bool, True where the next token is a text target."""
    position_ids: Tensor
    """(B, S) int64, from 0 at the start of every document."""
    cu_seqlens: Tensor
    """(documents + 1,) int32, flat positions of document borders; padding at a row's end is a document of its own."""
    max_seqlen: int
    """Length of the longest document, in tokens."""
    label_positions: Tensor
    """(K,) int64, flat positions where ``loss_mask`` is True, ascending; of these, under context parallelism, the ones
    that the rank holds."""
    image_slots: Tensor
    """(num_images,) int64, flat position of each image's first latent; its other latents follow."""
    context_slots: Tensor
    """(N,) int64, flat position of the ``<BoI>`` before each image; 0 for a blank slot."""
    has_context: Tensor
    """(N,) bool, True where the image may be contrasted with its context."""
    image_keys: Tensor
    """(N,) int64, identifies the image in the corpus; seeds crops and drop-path. Under context parallelism of the
    images that the rank encodes."""
    image_ok: Tensor
    """(N,) bool, False for a blank slot and for an image that could not be decoded."""
    images: Tensor | None
    """(N, 3, size, size) uint8 RGB, or float already normalised; None on stages that hold no patch embedding.
    Under context parallelism those that the rank encodes."""
    num_images: int
    """Real images; N = max(1, num_images)."""
    image_hashes: Tensor | None = None
    """(N,) int64, not negative, equal where the images' source files are, in any corpus and epoch; 0 for a blank slot.
    None where nothing is contrasted with other batches."""
    context_hashes: Tensor | None = None
    """(N,) int64, not negative, equal where what stands before ``<BoI>`` in the document is; 0 = nothing but special
    tokens, and for a blank slot. None as ``image_hashes``."""
    runs: AttentionRuns | None = None
    """What the rank's positions attend to, under context parallelism; None = each document to itself."""

    @property
    def num_image_slots(self) -> int:
        """N: image slots of the micro-batch, all of which are contrasted."""
        return max(1, self.num_images)

    @property
    def num_encoded(self) -> int:
        """Image slots that this rank encodes: rows of ``images``. N unless context parallelism splits them."""
        return self.image_keys.shape[0]

    @property
    def pair_mask(self) -> Tensor:
        """(N,) bool, True where the image and its context form a contrastive pair."""
        return self.has_context & self.image_ok

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedBatch:
        """Return the batch with every tensor on ``device``; ``non_blocking`` helps only from pinned memory."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor | AttentionRuns)
        }
        return dataclasses.replace(self, **moved)

    def with_image_ok(self, image_ok: Tensor) -> PackedBatch:
        """Return the batch with another decoding verdict, (N,) bool.

        Pixels of an image that any rank could not decode become blank here too: tensor-parallel
        ranks decode for themselves, and must feed the same pixels into the shared layers.
        """
        images = self.images
        if images is not None and not bool(image_ok.all()):
            blank = torch.tensor(BLANK_PIXEL if images.dtype == torch.uint8 else (0, 0, 0), dtype=images.dtype)
            keep = image_ok.to(images.device)[:, None, None, None]
            images = torch.where(keep, images, blank.to(images.device)[None, :, None, None])
        return dataclasses.replace(self, image_ok=image_ok, images=images)


@dataclass(frozen=True)
class StepLayout:
    """Counts of one global batch on every data-parallel rank, known from the plan without communication."""

    num_images: np.ndarray
    """(micro-batches, data-parallel ranks) int64, real images of each micro-batch."""
    has_context: np.ndarray
    """(all images,) bool, ordered by micro-batch, then rank, then image."""
    num_targets: int
    """Text targets of the global batch."""
    num_tokens: int
    """Positions of the global batch that hold a document, image latents included; the rest is padding."""
    sum_squared_lengths: int
    """Sum over documents of length squared, for the cost of attention."""

    def image_range(self, micro_batch: int, dp_rank: int) -> tuple[int, int]:
        """Return begin and end of a micro-batch's images in ``has_context``."""
        flat = self.num_images.reshape(-1)
        index = micro_batch * self.num_images.shape[1] + dp_rank
        begin = int(flat[:index].sum())
        return begin, begin + int(flat[index])


@dataclass(frozen=True)
class StepBatch:
    """Everything one optimizer step reads on one rank."""

    step: int
    """Index of the optimizer step, from 0."""
    layout: StepLayout
    """Counts on all ranks."""
    micro_batches: tuple[PackedBatch, ...]
    """This rank's micro-batches, in order."""
    bad_images: tuple[str, ...] = ()
    """Source and reason of every image of this rank that could not be decoded."""
    row_numbers: tuple[tuple[int, ...], ...] = ()
    """For each of ``micro_batches``, the number of each of its rows in the sequence of all rows of the run; empty where
    the micro-batches were not planned."""
