"""Batches of encoded images to batches of pixels, whatever decodes them: the interface, and the CPU's decoder.

Every image stands for itself. One that cannot be decoded is blank and has a text that says why; the others do not
notice, and neither the batch nor the thread an image is decoded in changes a pixel.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lcl_megatron.data.decoding.image_probe import ImageError, read_header
from lcl_megatron.data.decoding.images import TrainingTransform, blank_image, decode_crop, empty_images, resize_into


@dataclass(frozen=True)
class DecodedImages:
    """A batch of pixels."""

    pixels: Tensor
    """(N, 3, size, size) uint8 RGB, channels last in memory; the mean colour where there is an error."""
    errors: tuple[str | None, ...]
    """N texts, None for an image that was decoded."""


class EncodedImages(Protocol):
    """A list of encoded images, which may be read on demand: each is asked for once, in any thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


class PendingImages(Protocol):
    """A batch that is being decoded."""

    def result(self) -> DecodedImages:
        """Wait for the batch; raises what reading the encoded images raised."""


class ImageDecoder(Protocol):
    """Decodes batches, several at a time."""

    size: int
    """Side of the pixels."""

    def submit(self, encoded: EncodedImages, keys: Sequence[int]) -> PendingImages:
        """Begin to decode a batch.

        Args:
            encoded: N images.
            keys: N image keys, which decide the crops.
        """

    def close(self) -> None:
        """Give up what has not been decoded and end all threads; waits for images in progress."""


class MemoryBudget:
    """Lets threads proceed, first come first served, as long as all together stay below a limit.

    Args:
        limit: In bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._turn = threading.Lock()
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Wait until ``amount`` bytes, at most the limit, are free, and hold them."""
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self._used + amount <= self._limit)
            self._used += amount
        try:
            yield
        finally:
            with self._freed:
                self._used -= amount
                self._freed.notify()


class SingleImageDecoder:
    """Decodes one image after the other on the CPU, in any number of threads within one memory budget.

    Args:
        transform: Makes pixels of bytes and key; its ``max_memory`` is the budget of all threads together.
    """

    def __init__(self, transform: TrainingTransform) -> None:
        self._transform = transform
        self._budget = MemoryBudget(transform.max_memory)
        self._blank = blank_image(transform.size)

    def __call__(self, pixels: Tensor, data: bytes, key: int, first_draw: Sequence[float] | None = None) -> str | None:
        """Decode one image.

        Args:
            pixels: (3, size, size) uint8, channels last in memory; is overwritten.
            data: Encoded image.
            key: Image key.
            first_draw: See ``TrainingTransform.box``.

        Returns:
            What is wrong with the image; None if nothing is.
        """
        try:
            header = read_header(data, self._transform.limits)
            with self._budget.hold(header.memory):
                box = self._transform.box(key, header.height, header.width, first_draw)
                resize_into(pixels, decode_crop(data, header, box))
        except ImageError as error:
            pixels.numpy()[:] = self._blank.numpy()
            return str(error)
        return None


class CpuDecoder:
    """Decodes with simplejpeg and Pillow in a pool of threads; both, and the resize, run without the GIL.

    Args:
        transform: Makes pixels of bytes and key.
        num_threads: Threads; 0 = the caller's.
        pin: Whether pixels are put into page-locked memory.
    """

    def __init__(self, transform: TrainingTransform, num_threads: int = 0, pin: bool = False) -> None:
        self.size = transform.size
        """Side of the pixels."""
        self._transform = transform
        self._decode = SingleImageDecoder(transform)
        self._pin = pin
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, "image-decoder") if num_threads else None
        self._closed = threading.Event()

    def submit(self, encoded: EncodedImages, keys: Sequence[int]) -> PendingImages:
        """Begin to decode a batch; without threads, decode it."""
        pixels = empty_images(len(encoded), self.size, self._pin)
        crops = list(zip(keys, self._transform.draw(keys), strict=True))
        batch = _Batch(pixels, encoded, crops, self._decode, self._closed)
        if self._pool is None:
            batch.work()
        else:
            batch.workers = [self._pool.submit(batch.work) for _ in range(min(self._num_threads, len(encoded)))]
        return batch

    def close(self) -> None:
        """End all threads."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class _Batch:
    """Images that several workers take from one iterator, so that a large one holds up nobody else."""

    def __init__(
        self,
        pixels: Tensor,
        encoded: EncodedImages,
        crops: Sequence[tuple[int, Sequence[float]]],
        decode: SingleImageDecoder,
        closed: threading.Event,
    ) -> None:
        self.workers: list[Future[None]] = []
        self._pixels = pixels
        self._encoded = encoded
        self._crops = crops
        self._decode = decode
        self._closed = closed
        self._errors: list[str | None] = [None] * len(encoded)
        self._indices = iter(range(len(encoded)))

    def work(self) -> None:
        """Decode images until there are none left."""
        for index in self._indices:
            if self._closed.is_set():
                return
            self._errors[index] = self._decode(self._pixels[index], self._encoded[index], *self._crops[index])

    def result(self) -> DecodedImages:
        """Wait for all workers; raises the error of the first one that has one."""
        for worker in self.workers:
            worker.result()
        return DecodedImages(self._pixels, tuple(self._errors))
