"""What cannot be derived from the code: how far real machines stay behind their data sheets.

None of these values is fitted to the figures that ``docs/planning.md`` compares predictions with. All are flags.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lcl_megatron.config.errors import require


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Rates relative to data sheets, and fixed costs."""

    product_share: float = 0.80
    """Share of the peak that the best matrix product of any shape reaches (H100: 794.5 of 989 TFLOP/s measured)."""
    product_half_width: int = 256
    """A product whose narrowest matrix side is this wide reaches half of that; 1,024 wide 80%, 768 wide 75%."""
    attention_share: float = 0.22
    """Share of the peak of flash attention, forward and backward, heads of 64, 512 to 2,048 positions (H100)."""
    float32_share: float = 0.5
    """Share of the plain float32 peak in the products of the contrastive loss."""
    memory_share: float = 0.81
    """Share of the memory bandwidth that element-wise kernels reach."""
    elementwise_passes: float = 26.0
    """Times that a layer's forward pass moves one activation of the residual stream's size through memory: 78 with the
    backward pass, without kernel fusion; a fully fused layer needs half."""
    kernel_us: float = 5.0
    """Time to launch a kernel, in microseconds; a stage is never faster than its launches."""
    kernels_per_layer: int = 25
    """Kernels of a layer's forward pass."""
    overlap_share: float = 0.9
    """Share of a pass behind which an overlapped collective can hide."""
    nvlink_share: float = 0.8
    """Share of NVLink's bandwidth that large collectives within a machine reach."""
    network_share: float = 0.94
    """Share of the machine's network bandwidth that large collectives reach (377 of 400 GB/s on 4 x 8 GPUs)."""
    hop_us: float = 1.5
    """Latency of one step of a ring of small messages, in microseconds (98 us for an all-reduce of 32 ranks)."""
    tree_hop_us: float = 10.0
    """Latency of one level of a tree over machines, in microseconds."""
    half_bandwidth_mib: float = 2.0
    """Message per rank, in MiB, at which a collective reaches half of its bandwidth (8 and 32 ranks measured)."""
    host_hop_us: float = 25.0
    """Latency of one step of a ring between processors over TCP, in microseconds (gloo)."""
    fixed_ms: float = 2.0
    """Everything else that a step waits for, once, in milliseconds: launches of the optimizer, reading its norm."""
    reserve_gib: float = 6.0
    """Memory that the driver, communication buffers and fragmentation take."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            require(value >= 0, f"assumptions.{field.name} = {value}; it must not be negative")
            is_share = field.name.endswith("_share")
            require(not is_share or 0 < value <= 1, f"assumptions.{field.name} = {value}; it is a share, in (0, 1]")
