"""Contrastive loss over ranks where slots show the same. Oracles: the full matrix of all ranks' valid pairs with the
entries of false negatives at -inf, float64, one process and autograd; counts by comparing all pairs with all.
Communication: the process group is destroyed before the backward passes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lcl_megatron.config import LossConfig
from lcl_megatron.parallel.contrastive import ContrastiveOutput, PairSlots, SlotIdentity, contrastive_loss
from tests.batches import make_rows
from tests.distributed import run_distributed
from tests.parallel.test_layouts import CONFIG, ROWS

WIDTH = 5
MASKS = list(itertools.product([False, True], repeat=2))
NAMES = ("same_image", "same_context", "empty_context", "left_out")


@dataclass(frozen=True)
class Case:
    """What all ranks' slots show, and which are pairs."""

    num_slots: tuple[int, ...]
    images: tuple[int, ...]
    contexts: tuple[int, ...]
    no_pairs: tuple[int, ...] = ()

    @property
    def is_pair(self) -> Tensor:
        is_pair = torch.ones(len(self.images), dtype=torch.bool)
        is_pair[list(self.no_pairs)] = False
        return is_pair

    def features(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(self.images))
        pooled, noise = torch.randn(2, len(self.images), WIDTH, generator=generator, dtype=torch.float64)
        return 3 * pooled, pooled + noise

    def identity(self, own: slice, masks: tuple[bool, bool]) -> SlotIdentity:
        hashes = torch.tensor([self.images, self.contexts], dtype=torch.int64)
        return SlotIdentity(*hashes[:, own], *masks)


LARGE = 2**63 - 1
CASES = {
    "images across ranks": Case((3, 4), (1, 2, 3, 2, 1, 9, 1), (1, 2, 3, 4, 5, 6, 7)),
    "contexts across ranks": Case((3, 4), (1, 2, 3, 4, 5, 6, 7), (LARGE, 1, LARGE - 1, LARGE, 0, 0, 5)),
    "both, and slots that are no pair": Case(
        (5, 3), (1, 1, 2, 3, 4, 1, 2, 0), (7, 8, 8, 0, 0, 7, 9, 0), no_pairs=(1, 7)
    ),
    "only no pairs are equal": Case((2, 2), (1, 2, 1, 3), (5, 0, 7, 0), no_pairs=(2, 3)),
    "all images equal": Case((2, 3), (4,) * 5, (1, 2, 3, 4, 5)),
    "all contexts empty": Case((3, 2), (1, 2, 3, 4, 5), (0,) * 5),
    "all equal": Case((2, 2), (LARGE,) * 4, (3,) * 4),
    # Slot 0 shares its image with 1 and 2 and its context with 3: under both masks nothing is left of its row.
    "rows of which only the own column is left": Case((2, 2), (1, 1, 1, 2), (1, 2, 3, 1)),
    "a rank without slots": Case((0, 3), (1, 1, 2), (5, 6, 5)),
    "a rank of which nothing is a pair": Case((1, 3), (0, 1, 1, 2), (0, 6, 6, 5), no_pairs=(0,)),
    "no pair at all": Case((2, 1), (1, 1, 1), (1, 1, 1), no_pairs=(0, 1, 2)),
    "no slot at all": Case((0, 0), (), ()),
}


def _false_negatives(case: Case, masks: tuple[bool, bool]) -> Tensor:
    """(pairs, pairs) bool, by a double loop."""
    pairs = case.is_pair.nonzero()[:, 0].tolist()
    left_out = torch.zeros(len(pairs), len(pairs), dtype=torch.bool)
    for (i, a), (j, b) in itertools.permutations(enumerate(pairs), 2):
        same = (masks[0] and case.images[a] == case.images[b], masks[1] and case.contexts[a] == case.contexts[b])
        left_out[i, j] = any(same)
    return left_out


def _full_matrix(case: Case, masks: tuple[bool, bool], leaves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the sum of the loss over all pairs, and all scores, -inf at what is left out."""
    pooled, context, logit_scale = leaves
    images, contexts = (F.normalize(features[case.is_pair], dim=1) for features in (pooled, context))
    scores = (logit_scale.exp() * images @ contexts.T).masked_fill(_false_negatives(case, masks), -torch.inf)
    losses = scores.logsumexp(1) + scores.logsumexp(0) - 2 * scores.diagonal()
    return losses.sum() / 2, scores.detach()


def _leaves(case: Case, own: slice) -> list[Tensor]:
    pooled, context = case.features()
    scale = torch.tensor(2.0, dtype=torch.float64)
    return [leaf.clone().requires_grad_() for leaf in (pooled[own], context[own], scale)]


def _on_rank(rank: int, world_size: int, tile: int) -> list[dict[str, Tensor]]:
    """Loss, gradients, hits and counts of one rank, for all cases and masks."""
    outputs: list[tuple[list[Tensor], ContrastiveOutput]] = []
    for case, masks in itertools.product(CASES.values(), MASKS):
        begin = sum(case.num_slots[:rank])
        own = slice(begin, begin + case.num_slots[rank])
        leaves, slots = _leaves(case, own), PairSlots(case.num_slots, case.is_pair)
        identity = case.identity(own, masks)
        outputs.append((leaves, contrastive_loss(*leaves, slots, dist.group.WORLD, tile, identity)))
    dist.destroy_process_group()  # any communication from here on would raise
    found = []
    for leaves, output in outputs:
        output.loss_sum.backward()
        assert output.repeats is not None
        counts = {name: getattr(output.repeats, name) for name in NAMES}
        hits = {"image_hits": output.image_hits, "context_hits": output.context_hits}
        gradients = dict(zip(("pooled", "context", "scale"), (leaf.grad for leaf in leaves), strict=True))
        found.append({"loss": output.loss_sum.detach(), **gradients, **hits, **counts})
    return found


@pytest.fixture(scope="module", params=[1, 2, 100], ids=lambda tile: f"tile {tile}")
def found(request: pytest.FixtureRequest) -> dict[tuple[str, tuple[bool, bool]], list[dict[str, Tensor]]]:
    """What both ranks found, by name of the case and masks."""
    ranks = run_distributed(_on_rank, 2, request.param)
    return dict(zip(itertools.product(CASES, MASKS), map(list, zip(*ranks, strict=True)), strict=True))


@pytest.mark.parametrize("masks", MASKS, ids=["no mask", "context mask", "image mask", "both masks"])
@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_hits_equal_the_full_matrix(name, masks, found) -> None:
    case, ranks = CASES[name], found[name, masks]
    leaves = _leaves(case, slice(None))
    loss, scores = _full_matrix(case, masks, leaves)
    loss.backward()

    def close(got: Tensor, wanted: Tensor) -> None:
        scale = max(1.0, float(wanted.abs().amax())) if wanted.numel() else 1.0
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13 * scale)

    close(sum(rank["loss"] for rank in ranks), loss.detach())
    for key, leaf in zip(("pooled", "context"), leaves, strict=False):
        close(torch.cat([rank[key] for rank in ranks]), leaf.grad)
    close(sum(rank["scale"] for rank in ranks), leaves[2].grad)
    own = torch.arange(len(scores))
    for key, dim in (("image_hits", 1), ("context_hits", 0)):
        expected = int((scores.argmax(dim) == own).sum()) if len(own) else 0
        assert int(sum(rank[key] for rank in ranks)) == expected


@pytest.mark.parametrize("masks", MASKS, ids=["no mask", "context mask", "image mask", "both masks"])
@pytest.mark.parametrize("name", CASES)
def test_counts_of_every_rank_are_those_of_a_comparison_of_all_pairs(name, masks, found) -> None:
    case = CASES[name]
    matrices = [_false_negatives(case, m) for m in ((True, False), (False, True))]
    masked, pairs = _false_negatives(case, masks), case.is_pair.nonzero()[:, 0]
    for rank, counts in enumerate(found[name, masks]):
        begin = sum(case.num_slots[:rank])
        own = (begin <= pairs) & (pairs < begin + case.num_slots[rank])
        empty = [case.contexts[slot] == 0 for slot in pairs[own].tolist()]
        expected = [int(matrix.any(dim=1)[own].sum()) for matrix in matrices]
        expected += [sum(empty), int(masked[own].sum())]
        assert [int(counts[key]) for key in NAMES] == expected


@pytest.mark.parametrize(
    ("name", "masks"),
    [("all images equal", (True, False)), ("all contexts empty", (False, True)), ("all equal", (True, True))],
)
def test_loss_when_all_slots_are_the_same_is_zero(name, masks, found) -> None:
    """But for rounding: scores of about 7 are taken once from a product of matrices and once from a sum."""
    for rank in found[name, masks]:
        assert float(rank["loss"]) == pytest.approx(0, abs=1e-13)
        assert all(float(rank[key].abs().max()) < 1e-13 for key in ("pooled", "context", "scale"))
    assert sum(float(rank["loss"]) for rank in found[name, (False, False)]) > 0.1


def test_masks_change_loss_and_gradients_of_the_cases(found) -> None:
    """The cases would also agree with the matrix if none of them had a false negative."""
    plain, masked = (found["both, and slots that are no pair", masks] for masks in (MASKS[0], MASKS[3]))
    for key in ("loss", "pooled", "context", "scale"):
        assert not torch.allclose(plain[0][key], masked[0][key], rtol=1e-2)


def test_gradients_when_perturbed_numerically_agree() -> None:
    """torch.autograd.gradcheck, i.e. central differences, on one rank."""
    case = Case((6,), (1, 2, 1, 3, 3, 1), (1, 1, 2, 0, 0, 3), no_pairs=(5,))
    slots, identity = PairSlots(case.num_slots, case.is_pair), case.identity(slice(None), (True, True))

    def loss(*inputs: Tensor) -> Tensor:
        return contrastive_loss(*inputs, slots, None, 4, identity).loss_sum

    assert torch.autograd.gradcheck(loss, _leaves(case, slice(None)))


def test_without_identity_nothing_is_counted_and_the_loss_is_that_without_masks() -> None:
    case = Case((4,), (1, 1, 2, 1), (1, 2, 2, 2))
    leaves, slots = _leaves(case, slice(None)), PairSlots(case.num_slots, case.is_pair)
    without = contrastive_loss(*leaves, slots, None, 3)
    assert without.repeats is None
    unmasked = contrastive_loss(*leaves, slots, None, 3, case.identity(slice(None), (False, False)))
    assert torch.equal(without.loss_sum, unmasked.loss_sum)


def test_identity_of_micro_batches_is_theirs_one_behind_the_other() -> None:
    rows = make_rows(CONFIG, ROWS)
    assert min(row.num_images for row in rows) == 0
    loss = LossConfig(mask_same_context=True)
    found = SlotIdentity.of(rows, loss)
    assert found is not None
    assert (found.mask_same_image, found.mask_same_context) == (False, True)
    assert found.image_N.tolist() == [key for row in rows for key in row.image_hashes.tolist()]
    assert found.context_N.tolist() == [key for row in rows for key in row.context_hashes.tolist()]
    single = SlotIdentity.of(rows[:1], loss)
    assert single is not None
    assert single.image_N is rows[0].image_hashes


def test_micro_batches_that_do_not_say_what_they_show_cannot_be_masked() -> None:
    rows = make_rows(CONFIG, ROWS)
    for name in ("image_hashes", "context_hashes"):
        silent = [*rows[:2], dataclasses.replace(rows[2], **{name: None})]
        assert SlotIdentity.of(silent, LossConfig()) is None
        with pytest.raises(ValueError, match="same_context = False, but the micro-batches have no image_hashes"):
            SlotIdentity.of(silent, LossConfig(mask_same_image=True))


def test_identities_that_do_not_fit_are_refused() -> None:
    case = Case((4,), (1, 1, 2, 1), (1, 2, 2, 2))
    leaves, slots = _leaves(case, slice(None)), PairSlots(case.num_slots, case.is_pair)
    with pytest.raises(ValueError, match="the identity names 3 slots; this rank has 4"):
        contrastive_loss(*leaves, slots, None, 3, case.identity(slice(1, 4), (True, True)))
    with pytest.raises(ValueError, match=r"images are torch.int64 of shape \(4,\) and contexts torch.int32 of shape"):
        SlotIdentity(torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int32))
