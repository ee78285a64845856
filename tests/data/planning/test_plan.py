"""Oracles: set equality over an epoch, other layouts of the same run, collated batches against the announced layout."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.planning.plan import Plan, StepPlan
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, write

CONFIG = DataConfig(seq_length=96, max_images_per_document=3)
SEED = 11


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    return write(tmp_path_factory.mktemp("plan"), random_documents(250, 8))


def make_plan(
    written: WrittenCorpus,
    batch: tuple[int, int, int] = (12, 2, 1),
    config: DataConfig = CONFIG,
    seed: int = SEED,
) -> Plan:
    """A plan for (global batch size, micro-batch size, data-parallel size)."""
    return Plan([written.corpus], config, NUM_LATENTS, *batch, seed)


def contents(plan: StepPlan) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(row.index, row.epoch, tuple(row.documents.tolist())) for row in plan.rows]


def groups(plan: StepPlan) -> list[set[int]]:
    """Row numbers of each contrast group."""
    return [{plan.rows[i].index for i in group.reshape(-1)} for group in plan.dealt]


@pytest.mark.parametrize("batch", [(12, 1, 1), (12, 2, 2), (12, 1, 4), (12, 3, 4), (12, 12, 1)])
def test_the_rows_of_a_step_do_not_depend_on_the_layout(written: WrittenCorpus, batch: tuple[int, int, int]) -> None:
    one, other = make_plan(written), make_plan(written, batch)
    for step in (0, 1, 17):
        assert contents(other.step(step)) == contents(one.step(step))
        dealt = other.step(step).dealt
        assert dealt.shape == (12 // (batch[1] * batch[2]), batch[2], batch[1])
        assert sorted(dealt.reshape(-1).tolist()) == list(range(12))


def test_contrast_groups_depend_only_on_their_size(written: WrittenCorpus) -> None:
    plans = [make_plan(written, batch) for batch in ((16, 4, 1), (16, 2, 2), (16, 1, 4))]
    for step in range(5):
        found = [groups(plan.step(step)) for plan in plans]
        assert found[0] == found[1] == found[2]


def test_steps_can_be_asked_in_any_order_and_by_a_copy(written: WrittenCorpus) -> None:
    plan = make_plan(written)
    in_order = [contents(plan.step(step)) for step in range(30)]
    fresh = make_plan(written)
    backwards = [contents(fresh.step(step)) for step in reversed(range(30))]
    assert backwards[::-1] == in_order
    copy = pickle.loads(pickle.dumps(plan))
    assert contents(copy.step(21)) == in_order[21]


def test_a_run_goes_on_with_another_global_batch(written: WrittenCorpus) -> None:
    """8 steps of 12 rows, then steps of 20 rows: the sequence of rows goes on without gap or repetition."""
    plan = make_plan(written)
    rows = [row for step in range(13) for row in contents(plan.step(step))]
    other = make_plan(written, (20, 5, 2))
    resumed = [row for step in range(3) for row in contents(other.step(step, first_row=8 * 12 + step * 20))]
    assert resumed == rows[96:156]


def test_layout_announces_what_the_batches_hold(written: WrittenCorpus) -> None:
    plan = make_plan(written, (24, 3, 4))
    for number in range(4):
        step = plan.step(number)
        targets = tokens = squares = 0
        ranks = [step.micro_batches(rank) for rank in range(4)]
        for m in range(2):
            for rank in range(4):
                batch = collate_rows(plan.sequence, ranks[rank][m]).batch
                assert step.layout.num_images[m, rank] == batch.num_images
                begin, end = step.layout.image_range(m, rank)
                assert step.layout.has_context[begin:end].tolist() == batch.has_context[: batch.num_images].tolist()
                targets += len(batch.label_positions)
                first_tokens = batch.tokens.reshape(-1)[batch.cu_seqlens[:-1].long()]
                lengths = batch.cu_seqlens.diff()[first_tokens == written.corpus.special_tokens.bos]
                tokens += int(lengths.sum())
                squares += int((lengths**2).sum())
        assert len(step.layout.has_context) == step.layout.num_images.sum()
        assert (step.layout.num_targets, step.layout.num_tokens) == (targets, tokens)
        assert step.layout.sum_squared_lengths == squares


def test_image_counts_are_even_over_groups_and_ranks(written: WrittenCorpus) -> None:
    plan = make_plan(written, (96, 8, 4))
    for number in range(6):
        images = plan.step(number).layout.num_images
        assert np.ptp(images.sum(axis=1)) <= 1
        assert np.ptp(images, axis=1).max() <= 1
        assert np.ptp(images.sum(axis=0)) <= 1


def test_micro_batch_image_budget_is_checked_before_the_first_step(written: WrittenCorpus) -> None:
    images = max(make_plan(written, (24, 3, 4)).step(step).layout.num_images.max() for step in range(9))
    make_plan(written, (24, 3, 4), dataclasses.replace(CONFIG, max_images_per_micro_batch=int(images)))
    with pytest.raises(ConfigError, match=r"step 0: \d+ images .* 8 micro-batches .*max_images_per_micro_batch = 3;"):
        make_plan(written, (24, 3, 4), dataclasses.replace(CONFIG, max_images_per_micro_batch=3))


def test_fingerprint_changes_with_what_decides_the_rows_only(written: WrittenCorpus) -> None:
    plan = make_plan(written)
    assert make_plan(written, (24, 3, 4)).fingerprint == plan.fingerprint
    assert make_plan(written, config=dataclasses.replace(CONFIG, num_workers=7)).fingerprint == plan.fingerprint
    assert make_plan(written, seed=SEED + 1).fingerprint != plan.fingerprint
    for change in ({"layout": "pad"}, {"seq_length": 97}, {"too_many_images": "skip"}, {"max_images_per_row": 9}):
        other = make_plan(written, config=dataclasses.replace(CONFIG, **change))
        assert other.fingerprint != plan.fingerprint
        assert len(set(other.description.items()) - set(plan.description.items())) == 1
    pairs = dataclasses.replace(CONFIG, view=("pairs",))
    plan = make_plan(written, config=pairs)
    other = make_plan(written, config=dataclasses.replace(pairs, pair_placement="text_first"))
    assert set(other.description.items()) - set(plan.description.items()) == {("data.pair_placement", "text_first")}
    assert other.fingerprint != plan.fingerprint


def test_a_batch_that_cannot_be_divided_is_refused(written: WrittenCorpus) -> None:
    with pytest.raises(ConfigError, match="global_batch_size = 12 is not a positive multiple of .* 5 x 2 = 10"):
        make_plan(written, (12, 5, 2))
