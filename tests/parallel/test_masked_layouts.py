"""Masks of false negatives do not depend on the parallel layout. Oracle: a single process on the same global batch."""

from __future__ import annotations

import dataclasses

import pytest

from lcl_megatron.config import RunConfig
from tests.distributed import run_distributed
from tests.parallel.test_layouts import LOSS_TOLERANCE, Layout, _check, _run, _whole_gradients


@dataclasses.dataclass(frozen=True)
class MaskedLayout(Layout):
    """A layout in which pairs that are said to be the same are not each other's negatives."""

    masked: bool = True

    def config(self) -> RunConfig:
        config = super().config()
        loss = dataclasses.replace(config.loss, mask_same_image=self.masked, mask_same_context=self.masked)
        return dataclasses.replace(config, loss=loss)


LAYOUTS = [
    MaskedLayout("dp2, micro-batches of 2", 2, data_parallel_size=2),
    MaskedLayout("pp2 inside the LM", 4, cuts=("language.1",)),
    MaskedLayout("dp2 x tp2, sequence parallel", 2, data_parallel_size=2, tensor=2, sequence_parallel=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_masked_losses_and_gradients_equal_those_of_one_process(layout: MaskedLayout) -> None:
    rows = layout.micro_batch_size * layout.data_parallel_size
    single = run_distributed(_run, 1, MaskedLayout("single", rows))
    results = run_distributed(_run, layout.world_size, layout)
    _check(results[0][0], _whole_gradients(results, layout.tensor), single[0][0], _whole_gradients(single, 1))


def test_masks_change_the_contrast_and_nothing_else() -> None:
    """The grid would also pass if nothing was masked, or all."""
    masked, plain = (run_distributed(_run, 1, MaskedLayout("single", 4, masked=m))[0][0] for m in (True, False))
    assert masked[0] == pytest.approx(plain[0], rel=LOSS_TOLERANCE)
    assert 0.5 * plain[1] < masked[1] < 0.95 * plain[1]
