"""Contrastive loss over ranks. Oracle: the full similarity matrix of all ranks' valid pairs, float64, one process,
``F.cross_entropy`` and autograd. Communication: the process group is destroyed before the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lcl_megatron.parallel.contrastive import PairSlots, contrastive_loss
from tests.distributed import run_distributed

WIDTH = 5


def _features(num_slots: Sequence[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Unnormalised features of all ranks; pairs are alike, so that retrieval succeeds sometimes."""
    generator = torch.Generator().manual_seed(sum(num_slots))
    pooled = torch.randn(sum(num_slots), WIDTH, generator=generator, dtype=torch.float64)
    context = pooled + torch.randn(sum(num_slots), WIDTH, generator=generator, dtype=torch.float64)
    return (3 * pooled).to(dtype), context.to(dtype)


def _full_matrix(pooled: Tensor, context: Tensor, logit_scale: Tensor, is_pair: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the loss over all valid pairs, and the matrix of cosines."""
    images, contexts = (F.normalize(features[is_pair], dim=1) for features in (pooled, context))
    cosines = images @ contexts.T
    scores, target = logit_scale.exp() * cosines, torch.arange(len(images))
    loss = F.cross_entropy(scores, target, reduction="sum") + F.cross_entropy(scores.T, target, reduction="sum")
    return loss / 2, cosines


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.clone().requires_grad_()


def _on_rank(rank: int, world_size: int, num_slots: Sequence[int], is_pair: Tensor, tile: int) -> dict[str, Tensor]:
    """Loss, hits and gradients of one rank; NaN in every slot that is no pair."""
    pooled, context = _features(num_slots)
    pooled[~is_pair], context[~is_pair] = torch.nan, torch.nan
    begin = sum(num_slots[:rank])
    own = slice(begin, begin + num_slots[rank])
    leaves = {
        "pooled": _leaf(pooled[own]),
        "context": _leaf(context[own]),
        "logit_scale": _leaf(torch.tensor(2.0, dtype=torch.float64)),
    }
    output = contrastive_loss(*leaves.values(), PairSlots(num_slots, is_pair), dist.group.WORLD, tile)
    dist.destroy_process_group()  # any communication from here on would raise
    output.loss_sum.backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    figures = {name: getattr(output, name).detach() for name in ("loss_sum", "num_pairs", "image_hits", "context_hits")}
    return {
        **gradients,
        **figures,
        "images": output.images_GD[output.is_pair_G],
        "contexts": output.contexts_GD[output.is_pair_G],
    }


CASES = [
    [4],
    [1],
    [0],
    [3, 3],
    [5, 2],
    [0, 4],
    [4, 0],
    [1, 1],
    [0, 0],
    [2, 5, 0, 3],
    [0, 0, 1, 0],
    [3, 1, 2, 4],
    [0, 0, 0, 0],
]


@pytest.mark.parametrize("masking", ["all", "some", "none"])
@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("num_slots", CASES, ids=str)
def test_loss_and_gradients_when_ranks_differ_equal_full_matrix(num_slots, tile, masking):
    total = sum(num_slots)
    keep = {"all": 1.0, "some": 0.6, "none": 0.0}[masking]
    is_pair = torch.rand(total, generator=torch.Generator().manual_seed(total)) < keep
    ranks = run_distributed(_on_rank, len(num_slots), num_slots, is_pair, tile)

    pooled, context = _features(num_slots)
    expected = {
        "pooled": _leaf(pooled),
        "context": _leaf(context),
        "logit_scale": _leaf(torch.tensor(2.0, dtype=torch.float64)),
    }
    loss, cosines = _full_matrix(*expected.values(), is_pair)
    loss.backward()
    assert not any(leaf.grad.isnan().any() for leaf in expected.values())

    def close(got: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(
            got, wanted, rtol=1e-12, atol=1e-13 * max(1.0, float(wanted.abs().amax())) if wanted.numel() else 0.0
        )

    close(sum(rank["loss_sum"] for rank in ranks), loss.detach())
    close(sum(rank["dlogit_scale"] for rank in ranks), expected["logit_scale"].grad)
    for name in ("pooled", "context"):
        close(torch.cat([rank[f"d{name}"] for rank in ranks]), expected[name].grad)
    own = torch.arange(len(cosines))
    hits = [
        int((best == own).sum()) if len(own) else 0
        for best in ((cosines.argmax(1), cosines.argmax(0)) if len(own) else (own, own))
    ]
    assert [int(sum(rank[name] for rank in ranks)) for name in ("image_hits", "context_hits")] == hits
    assert [int(rank["num_pairs"]) for rank in ranks] == [int(part.sum()) for part in is_pair.split(num_slots)]
    for rank in ranks:
        close(rank["images"], F.normalize(pooled[is_pair], dim=1))
        close(rank["contexts"], F.normalize(context[is_pair], dim=1))


@pytest.mark.parametrize("num_slots", [[4], [0]], ids=str)
def test_loss_when_torch_distributed_is_not_running_equals_full_matrix(num_slots):
    assert not dist.is_initialized()
    pooled, context = _features(num_slots)
    is_pair = torch.ones(sum(num_slots), dtype=torch.bool)
    scale = torch.tensor(2.0, dtype=torch.float64)
    output = contrastive_loss(pooled, context, scale, PairSlots(num_slots, is_pair), None, 2)
    torch.testing.assert_close(output.loss_sum, _full_matrix(pooled, context, scale, is_pair)[0], rtol=1e-12, atol=0)


def test_gradients_when_perturbed_numerically_agree():
    """torch.autograd.gradcheck, i.e. central differences."""
    pooled, context = _features([5])
    slots = PairSlots([5], torch.tensor([True, True, False, True, True]))

    def loss(*inputs: Tensor) -> Tensor:
        return contrastive_loss(*inputs, slots, None, 2).loss_sum

    assert torch.autograd.gradcheck(loss, (_leaf(pooled), _leaf(context), _leaf(torch.tensor(1.5).double())))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_loss_when_features_have_few_bits_is_computed_in_float32(dtype, rtol):
    """The reference reads the same rounded features in float64: only rounding of the inputs is lost."""
    pooled, context = _features([64], dtype)
    is_pair = torch.ones(64, dtype=torch.bool)
    leaves = _leaf(pooled), _leaf(context), _leaf(torch.tensor(4.6))
    output = contrastive_loss(*leaves, PairSlots([64], is_pair), None, 16)
    output.loss_sum.backward()
    exact = _leaf(pooled.double()), _leaf(context.double()), _leaf(torch.tensor(4.6).double())
    loss, _ = _full_matrix(*exact, is_pair)
    loss.backward()
    assert output.loss_sum.dtype == torch.float32
    assert output.loss_sum.item() == pytest.approx(loss.item(), rel=rtol)
    for got, wanted, grad_rtol in zip(
        leaves, exact, (torch.finfo(dtype).eps, torch.finfo(dtype).eps, 1e-6), strict=True
    ):
        assert got.grad.dtype == got.dtype
        worst = float((got.grad.double() - wanted.grad).abs().max() / wanted.grad.abs().max())
        assert worst < max(grad_rtol, 1e-5)


def test_arguments_when_they_do_not_fit_are_refused_with_both_sizes():
    pooled, context = _features([4])
    scale = torch.tensor(2.0)
    everything = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one per slot of num_slots = \[3\]"):
        PairSlots([3], everything)
    with pytest.raises(ValueError, match=r"pooled features \(3, 5\) .* must .* have 4 rows"):
        contrastive_loss(pooled[:3], context[:3], scale, PairSlots([4], everything), None, 2)
    with pytest.raises(ValueError, match="num_slots names 2 ranks; the group has 1"):
        contrastive_loss(pooled, context, scale, PairSlots([3, 1], everything), None, 2)
