"""Images decoded by NVIDIA DALI: on a GPU (``mixed``), or by the same graph on the CPU.

DALI fails a whole batch for one bad image, and decodes bombs. So headers are read first; what DALI cannot take, or
what is visibly cut, is decoded on the CPU; and a batch that fails all the same is decoded again one by one. Crops are
computed here. DALI then holds no state, and pixels do not depend on how images are batched.

Whole images are decoded and then cut: the decoders that are given a region crash on some GPUs (nvImageCodec issue 55).
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from lcl_megatron.data.decoding.image_decoder import DecodedImages, EncodedImages, PendingImages, SingleImageDecoder
from lcl_megatron.data.decoding.image_probe import ImageError, ImageHeader, read_header
from lcl_megatron.data.decoding.images import Box, TrainingTransform, empty_images

MAX_BATCH = 64
"""Images of one run of DALI's graph."""
MODES = {
    "JPEG": {"RGB"},
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA"},
    "BMP": {"1", "L", "P", "RGB", "RGBA"},
    "TIFF": {"L", "RGB", "RGBA"},
    "PPM": {"1", "L", "RGB"},
    "JPEG2000": {"L", "RGB", "RGBA"},
    "WEBP": {"RGB", "RGBA"},
}
"""Formats, and Pillow's names of their pixel formats, that DALI decodes to the same RGB as Pillow."""
TAIL = 4096
"""Bytes at the end of a file among which its end marker must be; some writers add a little behind it."""
MIN_FAILURES = 8
"""If so many images, one by one, are too much for DALI but not for Pillow, then DALI itself is at fault."""


def has_dali() -> bool:
    """Whether DALI is installed."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no other NVIDIA package either
        return False


class DaliDecoder:
    """Decodes with DALI, and on the CPU what DALI cannot.

    Args:
        transform: Makes boxes of keys, and pixels on the CPU; its ``max_memory`` also bounds a run of DALI.
        num_threads: Threads of DALI; 0 = one, and the caller waits for every batch.
        device: The GPU that decodes and keeps the pixels; None = the CPU.
        pin: Whether pixels that stay on the CPU are put into page-locked memory.
    """

    def __init__(
        self, transform: TrainingTransform, num_threads: int = 0, device: torch.device | None = None, pin: bool = False
    ) -> None:
        self.size = transform.size
        """Side of the pixels."""
        self._transform = transform
        self._device = device
        self._pin = pin and device is None
        self._decode_one = SingleImageDecoder(transform)
        self._graph = _Graph(transform.size, max(1, num_threads), device)
        self._pool = ThreadPoolExecutor(1, "image-decoder") if num_threads else None

    def submit(self, encoded: EncodedImages, keys: Sequence[int]) -> PendingImages:
        """Begin to decode a batch; without threads, decode it."""
        if self._pool is not None:
            future = self._pool.submit(self._decode, encoded, keys)
        else:
            future = Future[DecodedImages]()
            future.set_result(self._decode(encoded, keys))
        return future if self._device is None else _OnDevice(future, self._device)

    def close(self) -> None:
        """End the thread; waits for the batch in progress."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _decode(self, encoded: EncodedImages, keys: Sequence[int]) -> DecodedImages:
        data = [encoded[index] for index in range(len(encoded))]
        parts: list[tuple[list[int], Tensor]] = []
        rest = set(range(len(data)))
        for chunk in _chunks(self._candidates(data, keys), self._transform.max_memory):
            decoded, pixels = self._run(chunk)
            if decoded:
                parts.append((decoded, pixels))
            rest -= set(decoded)
        errors: list[str | None] = [None] * len(data)
        others = sorted(rest)
        on_cpu = empty_images(len(others), self._transform.size)
        for index, pixel in zip(others, on_cpu, strict=True):
            errors[index] = self._decode_one(pixel, data[index], keys[index])
        return DecodedImages(self._graph.join(len(data), [*parts, (others, on_cpu)], self._pin), tuple(errors))

    def _candidates(self, data: Sequence[bytes], keys: Sequence[int]) -> Iterator[_Candidate]:
        """Yield the images that DALI can probably decode."""
        draws = self._transform.draw(keys)
        for index, (encoded, key, draw) in enumerate(zip(data, keys, draws, strict=True)):
            try:
                header = read_header(encoded, self._transform.limits)
            except ImageError:
                continue
            if can_decode(encoded, header):
                box = self._transform.box(key, header.height, header.width, draw)
                yield _Candidate(index, encoded, key, header.memory, box)

    def _run(self, chunk: Sequence[_Candidate]) -> tuple[list[int], Tensor]:
        """Decode images together, or else one by one; return which were decoded, and their pixels."""
        try:
            return [item.index for item in chunk], self._graph.run(chunk)
        except RuntimeError as error:
            together = error
        good, pixels, culprits = [], [], []
        for item in chunk:
            try:
                pixels.append(self._graph.run([item]))
                good.append(item.index)
            except RuntimeError:
                culprits.append(item)
        if not good and len(culprits) >= MIN_FAILURES and self._all_decode_on_cpu(culprits):
            raise RuntimeError(
                f"DALI decodes none of {len(culprits)} images that Pillow decodes; set --image-backend cpu, or see "
                "its error above"
            ) from together
        return good, torch.cat(pixels) if pixels else empty_images(0, self._transform.size)

    def _all_decode_on_cpu(self, items: Sequence[_Candidate]) -> bool:
        (pixel,) = empty_images(1, self._transform.size)
        return all(self._decode_one(pixel, item.data, item.key) is None for item in items)


def can_decode(data: bytes, header: ImageHeader) -> bool:
    """Whether DALI can be expected to decode an image, and to the same pixels as Pillow.

    A file that lacks its end is not: it would fail the images beside it, and Pillow says why.
    """
    if header.mode not in MODES.get(header.format, ()):
        return False
    if header.format == "JPEG":
        return header.plain_jpeg and data.rfind(b"\xff\xd9", -TAIL) >= 0
    if header.format == "PNG":
        return data.rfind(b"IEND", -TAIL) >= 0
    if header.format == "WEBP":  # not the extended container, of which DALI knows no animation
        return data[12:16] in (b"VP8 ", b"VP8L") and len(data) >= struct.unpack("<I", data[4:8])[0] + 8
    return True


@dataclass(frozen=True)
class _Candidate:
    """An image for DALI."""

    index: int
    """Place in the batch."""
    data: bytes
    key: int
    memory: int
    """Bytes to decode it."""
    box: Box


class _Graph:
    """DALI's graph: decode, cut, resize. Built when first used, and anew after an error."""

    def __init__(self, size: int, num_threads: int, device: torch.device | None) -> None:
        self._size = size
        self._num_threads = num_threads
        self._device = device
        # Not the default stream, on which the training step's kernels queue up.
        self._stream = None if device is None else torch.cuda.Stream(device)
        self._pipeline: Any = None

    def run(self, items: Sequence[_Candidate]) -> Tensor:
        """Return (N, 3, size, size) uint8 of at most ``MAX_BATCH`` images; they are finished.

        Raises:
            RuntimeError: If one of them cannot be decoded.
        """
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            (resized,) = self._pipeline.run(
                encoded=[np.frombuffer(item.data, dtype=np.uint8) for item in items],
                start=[np.array((item.box.top, item.box.left), dtype=np.int32) for item in items],
                shape=[np.array((item.box.height, item.box.width), dtype=np.int32) for item in items],
            )
        except RuntimeError:
            self._pipeline = None
            raise
        # A copy: DALI's memory is its own. Its run has waited for the GPU.
        if self._stream is None:
            return torch.from_numpy(np.array(resized.as_array())).permute(0, 3, 1, 2)
        with torch.cuda.stream(self._stream):
            pixels = from_dlpack(resized.as_tensor()).clone()
        self._stream.synchronize()
        return pixels.permute(0, 3, 1, 2)

    def join(self, count: int, parts: Sequence[tuple[list[int], Tensor]], pin: bool) -> Tensor:
        """Put images (indices, pixels) in order, on the device; they are finished."""
        if self._stream is None:
            return _join(empty_images(count, self._size, pin), parts)
        with torch.cuda.stream(self._stream):
            shape = (count, self._size, self._size, 3)
            pixels = _join(torch.empty(shape, dtype=torch.uint8, device=self._device).permute(0, 3, 1, 2), parts)
        self._stream.synchronize()
        return pixels

    def _build(self) -> Any:
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        pipeline = Pipeline(
            batch_size=MAX_BATCH,
            num_threads=self._num_threads,
            device_id=None if self._device is None else self._device.index,
            prefetch_queue_depth=1,
        )
        # Both options are for the GPU only. No share for the hardware decoder, whose pixels differ a little: which
        # images it got would depend on the batch. Fancy upsampling is what libjpeg does.
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            image = fn.decoders.image(
                encoded,
                device="cpu" if self._device is None else "mixed",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
                hw_decoder_load=0.0,
            )
            cut = fn.slice(image, start=start, shape=shape, axes=[0, 1])
            size = [self._size, self._size]
            pipeline.set_outputs(fn.resize(cut, size=size, interp_type=types.INTERP_CUBIC, antialias=True))
        pipeline.build()
        return pipeline


class _OnDevice:
    """A batch on a GPU, made on another stream than the one that reads it."""

    def __init__(self, future: Future[DecodedImages], device: torch.device) -> None:
        self._future = future
        self._device = device

    def result(self) -> DecodedImages:
        """Wait for the batch; its memory is not used again before the current stream is done with it."""
        images = self._future.result()
        images.pixels.record_stream(torch.cuda.current_stream(self._device))
        return images


def _join(pixels: Tensor, parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    for indices, part in parts:
        pixels[indices] = part.to(pixels.device)
    return pixels


def _chunks(items: Iterable[_Candidate], max_memory: int) -> Iterator[list[_Candidate]]:
    """Yield runs of images that are few enough, and decode in bounded memory."""
    chunk: list[_Candidate] = []
    memory = 0
    for item in items:
        if chunk and (len(chunk) == MAX_BATCH or memory + item.memory > max_memory):
            yield chunk
            chunk, memory = [], 0
        chunk.append(item)
        memory += item.memory
    if chunk:
        yield chunk
