"""Data-sheet values of GPUs and of the machines they stand in.

Peaks are those of ``training/flops.py``; memory, its bandwidth, NVLink and network are the vendors' (decimal units, one
direction). The network is that of the usual eight-GPU machine with one adapter per GPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lcl_megatron.config.errors import ConfigError, require
from lcl_megatron.training.flops import device_peak_flops


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU, and how it is connected."""

    name: str
    """Name, as ``device_peak_flops`` reads it."""
    peak_tflops: float
    """Dense bf16, TFLOP/s."""
    fp32_tflops: float
    """Plain float32, TFLOP/s; the contrastive loss is computed in it."""
    memory_gb: float
    """Memory, 10^9 bytes."""
    memory_tb_s: float
    """Memory bandwidth, 10^12 bytes per second."""
    nvlink_gb_s: float
    """To the other GPUs of the machine, 10^9 bytes per second, one direction."""
    network_gb_s: float
    """Network adapter of one GPU, 10^9 bytes per second, one direction."""
    gpus_per_node: int = 8
    """GPUs of one machine."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(field.name == "name" or value > 0, f"device {self.name}: {field.name} = {value}; must be positive")


_SHEETS: dict[str, tuple[str, float, float, float, float]] = {
    # name: (name for the peak, GB, TB/s, NVLink GB/s, network GB/s)
    "A100-40G": ("A100", 40, 1.555, 300, 25),
    "A100-80G": ("A100", 80, 2.039, 300, 25),
    "H100": ("H100", 80, 3.35, 450, 50),
    "H200": ("H200", 141, 4.8, 450, 50),
    "B200": ("B200", 180, 7.7, 900, 50),
    "B300": ("B300", 270, 7.7, 900, 100),
    "H20": ("H20", 96, 4.0, 450, 50),
    "MI300X": ("MI300X", 192, 5.3, 448, 50),
}
DEVICE_NAMES = tuple(_SHEETS)
"""Devices of the table; ``H100`` is the SXM module."""


def find_device(name: str) -> Device:
    """Return a device of the table.

    Raises:
        ConfigError: it is not there.
    """
    if name not in _SHEETS:
        raise ConfigError(
            f"--device {name}: not in the table; known: {', '.join(DEVICE_NAMES)}. For another GPU "
            "take the nearest and give its own values by --device-values.*"
        )
    peak_name, memory, bandwidth, nvlink, network = _SHEETS[name]
    peak, fp32 = device_peak_flops(peak_name, "bf16"), device_peak_flops(peak_name, "fp32")
    assert peak is not None, f"no bf16 peak of {peak_name}"
    assert fp32 is not None, f"no float32 peak of {peak_name}"
    return Device(
        name=name,
        peak_tflops=peak / 1e12,
        fp32_tflops=fp32 / 1e12,
        memory_gb=memory,
        memory_tb_s=bandwidth,
        nvlink_gb_s=nvlink,
        network_gb_s=network,
    )
