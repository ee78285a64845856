"""Which decoder a run uses: ``data.image_backend`` and what is installed decide."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.decoding.dali_decoder import DaliDecoder, has_dali
from lcl_megatron.data.decoding.image_decoder import CpuDecoder, ImageDecoder
from lcl_megatron.data.decoding.images import TrainingTransform

if TYPE_CHECKING:
    from lcl_megatron.config.run import ImageBackend


def resolve_image_backend(backend: ImageBackend) -> ImageBackend:
    """Return the backend that is used: ``auto`` becomes ``dali`` where DALI and a GPU are present, else ``cpu``.

    Raises:
        ConfigError: If what is asked for does not run here.
    """
    if backend == "auto":
        return "dali" if torch.cuda.is_available() and has_dali() else "cpu"
    if backend != "cpu" and not has_dali():
        raise ConfigError(
            f"data.image_backend = {backend!r}, and DALI is not installed: pip install 'lcl_megatron[dali]', or set "
            "--image-backend cpu"
        )
    if backend == "dali" and not torch.cuda.is_available():
        raise ConfigError("data.image_backend = 'dali' needs a CUDA device, and there is none; set --image-backend cpu")
    return backend


def make_decoder(backend: ImageBackend, transform: TrainingTransform, num_threads: int) -> ImageDecoder:
    """Return the decoder of a resolved backend.

    Args:
        backend: Not ``auto``.
        transform: Makes pixels of bytes and key.
        num_threads: Threads that decode; 0 = the caller's.
    """
    device = current_device()
    if backend == "cpu":
        return CpuDecoder(transform, num_threads, pin=device is not None)
    return DaliDecoder(transform, num_threads, device if backend == "dali" else None, pin=device is not None)


def current_device() -> torch.device | None:
    """Return the GPU that this thread uses, None where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def use_device(device: torch.device | None) -> None:
    """Make a new thread use the GPU that another one uses, if any; it would use the first one."""
    if device is not None:
        torch.cuda.set_device(device)
