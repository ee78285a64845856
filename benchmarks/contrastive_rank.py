"""One rank of a contrastive loss, measured in a process of its own; ``contrastive.py`` starts it.

python benchmarks/contrastive_rank.py '{"loss": "ours", "local_pairs": 2048, "ranks": 32, "width": 768}'
python benchmarks/contrastive_rank.py '{"local_pairs": 64, "ranks": 2, "width": 32, "rank": 0, "store": "FILE"}'

The first is rank 0 of 32, of which nobody else exists: peak memory, processor time and bytes of one loss. The second
is one of two real ranks over gloo, which compares the losses with each other. Prints one JSON object.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from counted_wire import Wire, counted, one_rank_of_many
from torch import Tensor
from torch.nn import functional as F

from lcl_megatron.checkpoint.stock_libraries import stock_library
from lcl_megatron.parallel.contrastive import PairSlots, contrastive_loss

LOG_SCALE = 2.6593
"""log(1 / 0.07), where training begins."""
LOSSES = ("ours", "open_clip_local", "open_clip_full")


@dataclass(frozen=True)
class Case:
    """What is measured."""

    local_pairs: int
    """Pairs of each rank."""
    ranks: int
    """Ranks."""
    width: int
    """Channels of the features."""
    loss: str = ""
    """One of ``LOSSES``; empty = all of them, compared."""
    tile: int = 4096
    """Columns that exist at one time in ours."""
    rank: int = 0
    """Rank of this process."""
    store: str = ""
    """File over which real ranks meet; empty = the others do not exist."""

    def features(self, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return image features and context features (pairs, D), pairs alike, and the log temperature, as leaves."""
        generator = torch.Generator().manual_seed(self.rank)
        images = torch.randn(pairs, self.width, generator=generator)
        contexts = images + torch.randn(pairs, self.width, generator=generator)
        return images.requires_grad_(), contexts.requires_grad_(), torch.tensor(LOG_SCALE).requires_grad_()

    def value(self, loss: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Return a function of features and log temperature: the mean over this rank's pairs, or over all pairs.

        Features are normalised in it, whichever it is.
        """
        if loss == "ours":
            return self._ours
        return self._open_clip(local_loss=loss == "open_clip_local")

    def _ours(self, images: Tensor, contexts: Tensor, log_scale: Tensor) -> Tensor:
        slots = PairSlots([len(images)] * self.ranks, torch.ones(len(images) * self.ranks, dtype=torch.bool))
        return contrastive_loss(images, contexts, log_scale, slots, dist.group.WORLD, self.tile).loss_sum / len(images)

    def _open_clip(self, local_loss: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        module = stock_library("open_clip").ClipLoss(
            local_loss=local_loss, gather_with_grad=True, rank=self.rank, world_size=self.ranks
        )

        def value(images: Tensor, contexts: Tensor, log_scale: Tensor) -> Tensor:
            result: Tensor = module(F.normalize(images, dim=1), F.normalize(contexts, dim=1), log_scale.exp())
            return result

        return value


def resident_mib(entry: str) -> float:
    """Return ``VmRSS`` (resident now) or ``VmHWM`` (at most, since it was last forgotten) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024


def processor_s() -> tuple[float, float]:
    """Return the processor time of this process, in seconds: all of it, and that outside the kernel."""
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_utime


def measure(case: Case) -> dict[str, Any]:
    """Return memory, time and bytes of one loss and its gradient, after one on a few pairs."""
    with one_rank_of_many(case.ranks, case.width) as wire:
        value = case.value(case.loss)
        value(*case.features(8)).backward()
        leaves = case.features(case.local_pairs)
        wire.sent.clear()
        wire.calls.clear()
        wire.direction, wire.making_up_s = "forward", 0.0
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, begin = resident_mib("VmRSS"), processor_s()
        loss = value(*leaves)
        middle, made_up_s = processor_s(), wire.making_up_s
        wire.direction = "backward"
        loss.backward()
        end, peak = processor_s(), resident_mib("VmHWM")
    assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in leaves)
    return {
        "value": float(loss.detach()),
        "peak_mib": peak - before,
        "cpu_s": end[0] - begin[0] - wire.making_up_s,
        "forward_cpu_s": middle[0] - begin[0] - made_up_s,
        "kernel_s": end[0] - begin[0] - (end[1] - begin[1]),
        **sent_by(wire),
    }


def sent_by(wire: Wire) -> dict[str, int]:
    """Return bytes and calls by direction."""
    directions = ("forward", "backward")
    return {f"{direction}_bytes": wire.sent[direction] for direction in directions} | {
        f"{direction}_calls": wire.calls[direction] for direction in directions
    }


def difference(ours: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest entry of the second."""
    return float((ours - other).abs().max() / other.abs().max())


def summed(value: Tensor) -> Tensor:
    """Return the sum over all ranks."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def compare(case: Case) -> dict[str, Any]:
    """Return bytes of every loss on real ranks, and how far value and gradients of the others are from ours.

    Summed over ranks, all are the same function: open_clip's full matrix gives every rank the mean over all pairs.
    """
    shared = dist.FileStore(case.store, case.ranks)
    dist.init_process_group("gloo", store=shared, rank=case.rank, world_size=case.ranks)
    reports: dict[str, Any] = {}
    results: dict[str, list[Tensor]] = {}
    for loss in LOSSES:
        leaves, wire = case.features(case.local_pairs), Wire(case.rank, case.ranks)
        with counted(wire):
            value = case.value(loss)(*leaves)
            wire.direction = "backward"
            value.backward()
        images, contexts, log_scale = (leaf.grad for leaf in leaves)
        assert images is not None
        assert contexts is not None
        assert log_scale is not None
        results[loss] = [summed(value), images, contexts, summed(log_scale)]
        reports[loss] = sent_by(wire)
        if loss != "ours":
            differences = [difference(a, b) for a, b in zip(results["ours"], results[loss], strict=True)]
            reports[loss] |= {"value_difference": differences[0], "gradient_difference": max(differences[1:])}
    dist.barrier()
    dist.destroy_process_group()
    return reports


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    asked = Case(**json.loads(sys.argv[1]))
    print(json.dumps(compare(asked) if asked.store else measure(asked)))
