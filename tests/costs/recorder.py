"""What a rank really sends: every operation of torch.distributed, by group and kind, as the dispatcher sees it.

All ways into a collective end in an operator of torch's ``c10d`` library, whichever wrapper was called and however a
module came by its reference to it. Calls over a group of one rank move nothing and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lcl_megatron.model import attention
from lcl_megatron.parallel.groups import ProcessGroups

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "send": "send",
    "recv_": None,
    "barrier": None,
}
"""Operator and what it is counted as. A received tensor is counted where it is sent; a barrier holds no bytes."""


class TrafficRecorder(TorchDispatchMode):
    """Counts calls and bytes while it is entered.

    The bytes of a call are those of the whole tensor that its group shares: what is reduced, what is gathered, what is
    scattered, what is sent.
    """

    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._names = _group_names(groups)
        self._patch = patch.object(attention, "causal_lower_right", _bias_beside_the_mode)

    def __enter__(self) -> Self:
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            assert name in KINDS, f"an operator that the recorder does not know: {func}"
            if KINDS[name] is not None:
                self._count(str(KINDS[name]), args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: tuple[Any, ...]) -> None:
        boxes = [value for value in args if isinstance(value, torch.ScriptObject)]
        (boxed,) = (box for box in boxes if str(box._type()).endswith("c10d.ProcessGroup"))
        group = dist.ProcessGroup.unbox(boxed)
        if group.size() == 1:
            return
        sizes = [
            sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(value) if isinstance(tensor, Tensor))
            for value in args[:2]
        ]
        key = self._names[group.group_name], kind
        self.counts[key] += 1
        self.bytes[key] += max(sizes)

    def totals(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Return calls and bytes by group and kind."""
        return {key: (self.counts[key], self.bytes[key]) for key in self.counts}


def _bias_beside_the_mode(queries: int, keys: int) -> CausalBias:
    """Make torch's causal mask, a subclass of its tensor that it cannot make while a dispatch mode looks on."""
    with _disable_current_modes():
        return causal_lower_right(queries, keys)


def _group_names(groups: ProcessGroups) -> dict[str, str]:
    collection = groups.collection
    named: Iterable[tuple[Any, str]] = [
        (collection.mp, "model"),
        (collection.intra_dist_opt, "all"),
        (collection.embd, "embedding"),
        (collection.tp, "tp"),
        (collection.pp, "pp"),
        (collection.cp, "cp"),
        (collection.dp_cp, "dp_cp"),
        (collection.intra_dp_cp, "dp_cp"),
        (collection.dp, "dp"),
        (groups.host, "host"),
    ]
    return {group.group_name: name for group, name in named if isinstance(group, dist.ProcessGroup)}
