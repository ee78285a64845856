"""Steps, one after the other, prepared ahead by threads.

One thread plans and collates step after step; a pool of threads reads and decodes its images, which needs Python's
lock only in between. Each step is a function of its number, so neither the number of threads nor their speed changes
what a step holds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lcl_megatron.config.errors import require
from lcl_megatron.data.batch import PackedBatch, StepBatch, StepLayout
from lcl_megatron.data.collate import CollatedRows, collate_rows
from lcl_megatron.data.decoding.image_backend import current_device, make_decoder, resolve_image_backend, use_device
from lcl_megatron.data.decoding.image_decoder import ImageDecoder, PendingImages
from lcl_megatron.data.decoding.images import TrainingTransform, blank_image

if TYPE_CHECKING:
    from lcl_megatron.data.planning.plan import Plan


class ImageSource(Protocol):
    """Holds encoded images, e.g. a ``Corpus``; is read in several threads at once."""

    def image_bytes(self, image: int) -> bytes:
        """Return the encoded bytes of an image."""

    def image_source(self, image: int) -> str:
        """Return where an image comes from, for messages."""


class StepLoader:
    """Iterates over the steps of one data-parallel rank, in order.

    ``data.num_workers`` threads decode images while another one prepares ``data.prefetch_factor`` steps ahead; 0
    workers = the caller does it all, when asked for a step. The threads end with the iterator, also when the loop over
    it is left early.

    Args:
        plan: The order of the run.
        dp_rank: Data-parallel rank whose micro-batches are made.
        image_size: Side of the images, in pixels.
        with_images: Decode images. False on pipeline stages that hold no patch embedding: ``images`` is None then,
            and every real image is taken for good.
        start_step: First step.
        consumed_rows: Rows consumed before it; None = ``start_step * global_batch_size``. A run that goes on with
            another global batch says here where it stands.
        end_step: Step before which to stop; None = never.

    Raises:
        ConfigError: If the rank does not exist, or the image backend does not run here.
    """

    def __init__(
        self,
        plan: Plan,
        dp_rank: int,
        image_size: int,
        with_images: bool = True,
        start_step: int = 0,
        consumed_rows: int | None = None,
        end_step: int | None = None,
    ) -> None:
        require(
            0 <= dp_rank < plan.data_parallel_size,
            f"dp_rank = {dp_rank}; the plan deals rows to {plan.data_parallel_size} data-parallel ranks, from 0",
        )
        config = plan.sequence.config
        self._plan = plan
        self._dp_rank = dp_rank
        self._config = config
        self._backend = resolve_image_backend(config.image_backend) if with_images else None
        self._transform = TrainingTransform(
            size=image_size,
            seed=plan.sequence.seed,
            crop_scale=config.crop_scale,
            crop_ratio=config.crop_ratio,
            max_pixels=config.max_image_pixels,
            max_memory=config.max_decode_megabytes * 1_000_000,
        )
        consumed_rows = start_step * plan.global_batch_size if consumed_rows is None else consumed_rows
        self._row_of_step_0 = consumed_rows - start_step * plan.global_batch_size
        self._start_step = start_step
        self._end_step = end_step

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps.

        Raises:
            CorpusError: If the corpus is damaged.
        """
        decoder = None
        if self._backend is not None:
            decoder = make_decoder(self._backend, self._transform, self._config.num_workers)
        try:
            if self._config.num_workers:
                yield from self._ahead(decoder)
            else:
                for step in self._numbers():
                    yield self._begin(step, decoder).result()
        finally:
            if decoder is not None:
                decoder.close()

    def _numbers(self) -> Iterable[int]:
        """Return the numbers of the steps; anew for every iterator, for threads take more of them than they yield."""
        return itertools.count(self._start_step) if self._end_step is None else range(self._start_step, self._end_step)

    def _ahead(self, decoder: ImageDecoder | None) -> Iterator[StepBatch]:
        """Yield the steps while a thread begins those behind them."""
        numbers = iter(self._numbers())
        planner = ThreadPoolExecutor(1, "step-planner", initializer=use_device, initargs=(current_device(),))
        try:
            first = itertools.islice(numbers, self._config.prefetch_factor)
            pending = deque(planner.submit(self._begin, step, decoder) for step in first)
            while pending:
                step = pending.popleft()
                pending.extend(planner.submit(self._begin, number, decoder) for number in itertools.islice(numbers, 1))
                yield step.result().result()
        finally:
            planner.shutdown(cancel_futures=True)

    def _begin(self, step: int, decoder: ImageDecoder | None) -> _PendingStep:
        """Plan and collate a step and begin to decode its images."""
        plan = self._plan.step(step, self._row_of_step_0 + step * self._plan.global_batch_size)
        pin = torch.cuda.is_available()
        batches: list[_PendingBatch | PackedBatch] = []
        dealt = plan.micro_batches(self._dp_rank)
        for rows in dealt:
            collated = collate_rows(self._plan.sequence, rows)
            if pin:
                collated = dataclasses.replace(collated, batch=_pinned(collated.batch))
            if decoder is None:
                batches.append(collated.batch)
            else:
                batches.append(_begin_images(collated, self._plan.sequence, decoder))
        row_numbers = tuple(tuple(row.index for row in rows) for rows in dealt)
        return _PendingStep(plan.step, plan.layout, tuple(batches), row_numbers)


def add_images(collated: CollatedRows, source: ImageSource, decoder: ImageDecoder) -> tuple[PackedBatch, list[str]]:
    """Decode the images of a micro-batch. One that cannot be decoded is blank and not ok; nothing is re-drawn.

    Args:
        collated: The micro-batch.
        source: Holds the encoded images.
        decoder: Makes pixels of bytes and image keys.

    Returns:
        The micro-batch with ``images`` and ``image_ok``, and source and reason of every bad image.
    """
    return _begin_images(collated, source, decoder).result()


class _ImagesOf:
    """Images of a source, read when asked for: in the thread that decodes them."""

    def __init__(self, source: ImageSource, images: np.ndarray) -> None:
        self._source = source
        self._images = images.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> bytes:
        return self._source.image_bytes(self._images[index])


@dataclass(frozen=True)
class _PendingBatch:
    """A micro-batch whose images are being decoded."""

    collated: CollatedRows
    """The micro-batch."""
    source: ImageSource
    """Names its images."""
    images: PendingImages
    """Their pixels."""
    size: int
    """Side of the images."""

    def result(self) -> tuple[PackedBatch, list[str]]:
        """Wait for the images; return the micro-batch, and source and reason of every bad image."""
        batch, decoded = self.collated.batch, self.images.result()
        if batch.num_images == 0:
            return dataclasses.replace(batch, images=blank_image(self.size)[None].to(decoded.pixels.device)), []
        bad = {slot: error for slot, error in enumerate(decoded.errors) if error is not None}
        if bad:
            image_ok = batch.image_ok.clone()
            image_ok[list(bad)] = False
            batch = dataclasses.replace(batch, image_ok=image_ok)
        names = [f"{self.source.image_source(int(self.collated.images[slot]))}: {bad[slot]}" for slot in bad]
        return dataclasses.replace(batch, images=decoded.pixels), names


@dataclass(frozen=True)
class _PendingStep:
    """A step whose images are being decoded."""

    step: int
    """Index of the optimizer step."""
    layout: StepLayout
    """Counts on all ranks."""
    batches: tuple[_PendingBatch | PackedBatch, ...]
    """This rank's micro-batches; those that want no images are complete."""
    row_numbers: tuple[tuple[int, ...], ...]
    """Numbers of their rows (see ``StepBatch``)."""

    def result(self) -> StepBatch:
        """Wait for the images."""
        finished = [(batch, []) if isinstance(batch, PackedBatch) else batch.result() for batch in self.batches]
        bad_images = tuple(itertools.chain.from_iterable(bad for _, bad in finished))
        micro_batches = tuple(batch for batch, _ in finished)
        return StepBatch(self.step, self.layout, micro_batches, bad_images, self.row_numbers)


def _pinned(batch: PackedBatch) -> PackedBatch:
    """Return the micro-batch in page-locked memory, from which a GPU copies on its own."""
    tensors = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    pinned: dict[str, Any] = {**tensors}
    return dataclasses.replace(batch, **pinned)


def _begin_images(collated: CollatedRows, source: ImageSource, decoder: ImageDecoder) -> _PendingBatch:
    keys = collated.batch.image_keys.tolist()[: len(collated.images)]
    return _PendingBatch(collated, source, decoder.submit(_ImagesOf(source, collated.images), keys), decoder.size)
