"""Plain data parallelism.

Oracles: one process that computes what two share, and open_clip's loss on all pairs at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lcl_megatron.parallel.replicas import ReplicaError, Replicas, replicas_of_launcher
from tests.distributed import run_distributed

ALONE = Replicas(0, 1, torch.device("cpu"), None)


def on_ranks(function: Any, size: int = 2) -> list[Any]:
    """Call ``function(replicas)`` on every rank."""

    def start(_rank: int, _size: int) -> Any:
        with replicas_of_launcher() as replicas:
            return function(replicas)

    return run_distributed(start, size)


def test_without_a_launcher_there_is_one_process() -> None:
    with replicas_of_launcher() as replicas:
        assert (replicas.rank, replicas.size, replicas.group, replicas.is_first) == (0, 1, None, True)
        replicas.barrier()
        assert replicas.gather_objects("a") == ["a"]
        assert replicas.from_first(3) == 3
        rows = torch.arange(6).view(3, 2)
        assert torch.equal(replicas.gather_shares(rows, 3), rows)
        assert torch.equal(replicas.sum(rows), rows)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 9])
def test_shares_cover_everything_once(count: int) -> None:
    shares = [Replicas(rank, 3, torch.device("cpu"), None).share(count) for rank in range(3)]
    assert [index for share in shares for index in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_exchange_between_ranks() -> None:
    def exchange(replicas: Replicas) -> Any:
        share = replicas.share(5)
        rows = torch.tensor([[index, 10.0 * index] for index in share])
        copied = torch.full((2,), float(replicas.rank))
        replicas.copy_from_first([copied])
        total = replicas.sum(torch.tensor([1.0, replicas.rank]))
        return (
            replicas.gather_shares(rows, 5),
            copied,
            total,
            replicas.from_first(f"rank {replicas.rank}"),
            replicas.gather_objects(replicas.rank),
            replicas.is_first,
        )

    for rank, (rows, copied, total, first, everyone, is_first) in enumerate(on_ranks(exchange)):
        assert torch.equal(rows, torch.tensor([[i, 10.0 * i] for i in range(5)]))
        assert copied.tolist() == [0, 0]
        assert total.tolist() == [2, 1]
        assert (first, everyone, is_first) == ("rank 0", [0, 1], rank == 0)


def test_gradients_are_summed_and_divided_also_where_a_rank_has_none() -> None:
    def gradients(replicas: Replicas) -> list[Tensor]:
        weights = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(1)]
        (weights[0] * (replicas.rank + 1)).sum().backward()
        if replicas.rank == 1:
            (weights[1] * 5).sum().backward()
        replicas.sum_gradients(weights, 2.0)
        assert weights[2].grad is None
        return [weights[0].grad, weights[1].grad]

    for found in on_ranks(gradients):
        assert found[0].tolist() == [1.5, 1.5, 1.5]
        assert found[1].tolist() == [2.5, 2.5]


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(6, 4, generator=random, dtype=torch.float64) for _ in range(2))
    return images, texts, torch.tensor(1.3, dtype=torch.float64)


def oracle(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss as Radford et al. print it, as a sum over pairs."""
    logits = scale.exp() * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels, reduction="sum") + F.cross_entropy(logits.T, labels, reduction="sum")) / 2


@pytest.mark.parametrize("left_out", [None, 4])
def test_contrast_over_ranks_equals_all_pairs_at_once(left_out: int | None) -> None:
    def contrast(replicas: Replicas) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, texts, scale = pairs()
        own = slice(replicas.rank * 3, replicas.rank * 3 + 3)
        images, texts = images[own].clone().requires_grad_(), texts[own].clone().requires_grad_()
        scale.requires_grad_()
        is_pair = None if left_out is None else torch.arange(6)[own] != left_out
        total = replicas.contrast(images, texts, scale, is_pair)
        total.backward()
        assert images.grad is not None
        return replicas.sum(total), replicas.gather(images.grad, [3, 3]), replicas.sum(scale.grad), texts.grad

    images, texts, scale = (tensor.requires_grad_() for tensor in pairs())
    kept = torch.tensor([index for index in range(6) if index != left_out])
    expected = oracle(images[kept], texts[kept], scale)
    expected.backward()
    for rank, (total, image_gradients, scale_gradient, text_gradients) in enumerate(on_ranks(contrast)):
        torch.testing.assert_close(total, expected.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(image_gradients, images.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scale_gradient, scale.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(text_gradients, texts.grad[3 * rank : 3 * rank + 3], rtol=1e-9, atol=1e-9)


def test_more_processes_than_gpus_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ReplicaError, match="LOCAL_RANK = 1, but this node has 1 GPUs"), replicas_of_launcher():
        pass


def test_neither_replicas_nor_transfer_need_megatron() -> None:
    code = (
        "import sys; sys.modules['megatron'] = None; "
        "import lcl_megatron.evaluation.commands, lcl_megatron.parallel.replicas"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
