"""How long collectives take: bandwidth, and a start-up time that grows with the group.

A large message of S bytes costs ``f S / B``, f being the share of it that a ring algorithm sends from each rank, B the
bandwidth of the slowest link that the group shares. Beside that, the lesser of two start-up times: that of the
low-latency protocols (a ring of hops, at an eighth of the bandwidth), and that of filling the pipeline of the fast ones
(a message of ``half_bandwidth_mib`` per rank). Published all-reduce tables of 8 x H200 and 4 x 8 B200 (stas00,
ml-engineering, network/benchmarks) lie within a factor 1.5 of it; see ``docs/planning.md``. Beyond 32 ranks
the linear growth is an extrapolation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcl_megatron.costs.assumptions import Assumptions
from lcl_megatron.costs.devices import Device
from lcl_megatron.costs.traffic import Group, Kind, Ranks, Transfer

LOW_LATENCY_SLOWDOWN = 8
"""Bandwidth of the fast protocols over that of the low-latency ones."""
MIB = 1 << 20
HOST_BYTES_PER_S = 1e9
"""Between processors, over TCP."""


@dataclass(frozen=True)
class Network:
    """The links of a machine room, for one layout."""

    device: Device
    """GPU and machine."""
    assumptions: Assumptions
    """How far links stay behind their data sheets."""
    ranks: Ranks
    """Sizes of the groups; ranks are numbered tp fastest, then cp, then dp, then pp."""

    def seconds(self, transfer: Transfer) -> float:
        """Return the time of all calls of a transfer, one after the other."""
        number = self.ranks.size(transfer.group)
        if transfer.group == "host":
            # gloo sends around a ring, segment by segment.
            steps = 2 * (number - 1) * self.assumptions.host_hop_us * 1e-6
            return transfer.calls * (steps + 2 * transfer.call_bytes / HOST_BYTES_PER_S)
        if transfer.kind == "send":
            once = self.assumptions.tree_hop_us * 1e-6 + transfer.call_bytes / self.bandwidth("pp")
            return transfer.calls * once
        bandwidth, spans = self.bandwidth(transfer.group), not self.is_within_node(transfer.group)
        return transfer.calls * self.collective_seconds(transfer.kind, transfer.call_bytes, number, bandwidth, spans)

    def is_within_node(self, group: Group) -> bool:
        """Return whether all ranks of a group stand in one machine."""
        return self.ranks.size(group) <= self._members_per_node(group)

    def bandwidth(self, group: Group) -> float:
        """Return bytes per second of a group's slowest link, as the share of each of its ranks."""
        nvlink = self.device.nvlink_gb_s * 1e9 * self.assumptions.nvlink_share
        if self.is_within_node(group):
            return nvlink
        # A ring leaves the machine once, through the adapters of all members that the machine holds.
        adapters = self._members_per_node(group)
        return min(nvlink, adapters * self.device.network_gb_s * 1e9 * self.assumptions.network_share)

    def collective_seconds(self, kind: Kind, size: float, ranks: int, bandwidth: float, spans_nodes: bool) -> float:
        """Return the time of one collective.

        Args:
            kind: what is called.
            size: bytes of the tensor that the group shares.
            ranks: of the group.
            bandwidth: bytes per second.
            spans_nodes: whether the group stands in several machines.
        """
        assumed = self.assumptions
        rounds = 2 if kind == "all_reduce" else 1
        share = rounds * (ranks - 1) / ranks
        latency = rounds * (ranks - 1) * assumed.hop_us * 1e-6
        if kind == "all_reduce" and spans_nodes:
            latency = min(latency, 2 * math.ceil(math.log2(ranks)) * assumed.tree_hop_us * 1e-6)
        transfer = share * size / bandwidth
        fill = share * assumed.half_bandwidth_mib * MIB * ranks / bandwidth
        return transfer + min(latency + LOW_LATENCY_SLOWDOWN * transfer, fill)

    def _members_per_node(self, group: Group) -> int:
        """Return how many ranks of one group a machine holds."""
        per_node, ranks = self.device.gpus_per_node, self.ranks
        strides = {"tp": 1, "cp": ranks.tp, "dp_cp": ranks.tp, "dp": ranks.tp * ranks.cp, "all": 1}
        stride = strides.get(group, ranks.tp * ranks.replicas)
        if group == "model":
            return per_node if ranks.tp * ranks.replicas * ranks.pp <= per_node else max(1, min(ranks.tp, per_node))
        return max(1, per_node // stride)
