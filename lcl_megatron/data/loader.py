"""Steps, one after the other, prepared ahead by worker processes.

A worker is given the number of a step and does all of it for one data-parallel rank: plan, tokens, pixels. Workers
share nothing and hold no state, so neither their number nor their speed changes what a step holds.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lcl_megatron.config.errors import require
from lcl_megatron.data.batch import PackedBatch, StepBatch
from lcl_megatron.data.collate import CollatedRows, collate_rows
from lcl_megatron.data.images import ImageError, TrainingTransform, blank_image

if TYPE_CHECKING:
    from lcl_megatron.data.mixture import RowSequence
    from lcl_megatron.data.plan import Plan

ALIGNMENT_BYTES = 64
"""Every tensor of a parcel begins at a multiple of this."""


class StepLoader:
    """Iterates over the steps of one data-parallel rank, in order.

    ``data.num_workers`` processes prepare ``data.prefetch_factor`` steps each; 0 = this process does it all. The
    processes are started anew (not forked from this one, which may hold a GPU) and end with the iterator, also when
    the loop over it is left early.

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
        ConfigError: If the rank does not exist.
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
        transform = TrainingTransform(
            size=image_size,
            seed=plan.sequence.seed,
            crop_scale=config.crop_scale,
            crop_ratio=config.crop_ratio,
            max_pixels=config.max_image_pixels,
        )
        consumed_rows = start_step * plan.global_batch_size if consumed_rows is None else consumed_rows
        self._steps = _Steps(
            plan=plan,
            dp_rank=dp_rank,
            transform=transform if with_images else None,
            row_of_step_0=consumed_rows - start_step * plan.global_batch_size,
        )
        self._numbers: Iterable[int] = itertools.count(start_step) if end_step is None else range(start_step, end_step)
        self._num_workers = config.num_workers
        self._prefetch_factor = config.prefetch_factor if config.num_workers else None

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield the steps.

        Raises:
            RuntimeError: If a worker process died.
            CorpusError: If the corpus is damaged.
        """
        loader: DataLoader[_Parcel] = DataLoader(
            self._steps,
            batch_size=None,
            sampler=self._numbers,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor,
            multiprocessing_context=_start_method() if self._num_workers else None,
            worker_init_fn=partial(_obey_only, os.getpid()) if hasattr(signal, "sigwaitinfo") else None,
            pin_memory=torch.cuda.is_available(),
        )
        try:
            for parcel in _start(loader):
                yield parcel.open()
        except (RuntimeError, EOFError, ConnectionError) as error:
            # The last two: it died while its step was being handed over.
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise RuntimeError(
                f"a loader process died ({error!r}); often the machine ran out of memory: lower --num-workers or "
                "--prefetch-factor, or find its own message above"
            ) from error


@dataclass(frozen=True)
class _Steps(Dataset["_Parcel"]):
    """The steps of one rank, by number."""

    plan: Plan
    dp_rank: int
    transform: TrainingTransform | None
    row_of_step_0: int

    def __getitem__(self, step: int) -> _Parcel:
        plan = self.plan.step(step, self.row_of_step_0 + step * self.plan.global_batch_size)
        batches, bad_images = [], []
        for rows in plan.micro_batches(self.dp_rank):
            collated = collate_rows(self.plan.sequence, rows)
            if self.transform is None:
                batches.append(collated.batch)
            else:
                batch, bad = add_images(collated, self.plan.sequence, self.transform)
                batches.append(batch)
                bad_images.extend(bad)
        return _Parcel.seal(StepBatch(plan.step, plan.layout, tuple(batches), tuple(bad_images)))


def add_images(
    collated: CollatedRows, sequence: RowSequence, transform: TrainingTransform
) -> tuple[PackedBatch, list[str]]:
    """Decode the images of a micro-batch. One that cannot be decoded is blank and not ok; nothing is re-drawn.

    Args:
        collated: The micro-batch.
        sequence: Reads the encoded images.
        transform: Makes (3, size, size) uint8 pixels of bytes and image key.

    Returns:
        The micro-batch with ``images`` and ``image_ok``, and source and reason of every bad image.
    """
    batch = collated.batch
    pixels = blank_image(transform.size).repeat(batch.num_image_slots, 1, 1, 1)
    image_ok = batch.image_ok.clone()
    bad = []
    for slot, image in enumerate(collated.images.tolist()):
        try:
            pixels[slot] = transform(sequence.image_bytes(image), int(batch.image_keys[slot]))
        except ImageError as error:
            image_ok[slot] = False
            bad.append(f"{sequence.image_source(image)}: {error}")
    return dataclasses.replace(batch, images=pixels, image_ok=image_ok), bad


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in a parcel."""

    begin: int
    """In bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, buffer: Tensor) -> Tensor:
        size = self.dtype.itemsize * torch.Size(self.shape).numel()
        return buffer[self.begin : self.begin + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class _Parcel:
    """A ``StepBatch`` with all its tensors in one buffer.

    Each tensor that crosses a process border takes a file descriptor of its own; a step of many micro-batches,
    prefetched a few times, would use up the 1,024 that most systems allow. One buffer is also pinned in one call.
    """

    buffer: Tensor
    """(bytes,) uint8."""
    fields: tuple[dict[str, Any], ...]
    """Fields of each micro-batch, a ``_Place`` in place of each tensor."""
    step: StepBatch
    """Everything else."""

    @classmethod
    def seal(cls, step: StepBatch) -> _Parcel:
        """Copy all tensors into one buffer."""
        fields, tensors, end = [], [], 0
        for batch in step.micro_batches:
            values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
            for name, value in values.items():
                if isinstance(value, Tensor):
                    place = _Place(end, tuple(value.shape), value.dtype)
                    end += -(-value.numel() * value.element_size() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
                    values[name] = place
                    tensors.append((place, value))
            fields.append(values)
        buffer = torch.zeros(end, dtype=torch.uint8)
        for place, value in tensors:
            place.view(buffer).copy_(value)
        return cls(buffer, tuple(fields), dataclasses.replace(step, micro_batches=()))

    def open(self) -> StepBatch:
        """Return the step, its tensors being views of the buffer."""
        return dataclasses.replace(self.step, micro_batches=tuple(self._open(values) for values in self.fields))

    def pin_memory(self) -> _Parcel:
        """Return the parcel in page-locked memory, from which a GPU copies on its own."""
        return dataclasses.replace(self, buffer=self.buffer.pin_memory())

    def _open(self, values: dict[str, Any]) -> PackedBatch:
        tensors = {name: value.view(self.buffer) for name, value in values.items() if isinstance(value, _Place)}
        return PackedBatch(**values | tensors)


def _start(loader: DataLoader[_Parcel]) -> Iterator[_Parcel]:
    """Start the worker processes; of all SIGTERMs they obey only this process's.

    A scheduler sends SIGTERM to all processes of a job. The training process then wants to finish its step and save,
    which it could not if its loader were gone.
    """
    if not (loader.num_workers and hasattr(signal, "sigwaitinfo")):
        return iter(loader)
    # Workers, and the server that forks them, inherit the mask. Starting the tracker, which the first worker would
    # do, lifts it.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _obey_only(pid: int, worker: int) -> None:
    """End this worker when the process ``pid`` says so; runs in the worker, which has SIGTERM masked."""

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _start_method() -> str:
    """Return how worker processes start: from a clean server process, else anew."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    # The server imports torch once for all workers; too late, and ignored, when a server already runs.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return "forkserver"
