"""Oracles: set equality over an epoch, other layouts of the same run, collated batches against the announced layout."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.plan import Plan, StepPlan
from lcl_megatron.data.rows import IMAGES_CUT_OFF, NO_SIMILAR_IMAGE, WindowStart
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, write

CONFIG = DataConfig(seq_length=96, packing_window=40, max_images_per_document=3)
SEED = 11


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    return write(tmp_path_factory.mktemp("plan"), random_documents(250, 8))


def make_plan(
    written: WrittenCorpus,
    batch: tuple[int, int, int] = (12, 2, 1),
    config: DataConfig = CONFIG,
    seed: int = SEED,
    start: WindowStart | None = None,
) -> Plan:
    """A plan for (global batch size, micro-batch size, data-parallel size)."""
    return Plan(written.corpus, config, NUM_LATENTS, *batch, seed, start)


def contents(plan: StepPlan) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(row.index, row.epoch, tuple(row.documents.tolist())) for row in plan.rows]


def groups(plan: StepPlan) -> list[set[int]]:
    """Row numbers of each contrast group."""
    return [{plan.rows[i].index for i in group.reshape(-1)} for group in plan.dealt]


def test_every_eligible_document_comes_once_per_epoch_and_whole(written: WrittenCorpus) -> None:
    plan = make_plan(written)
    composer = plan.sequence.composer
    first = 0
    for epoch in range(3):
        num_rows = plan.num_rows_per_epoch(epoch)
        block = plan.sequence.read(first, num_rows)
        first += num_rows
        seen = np.concatenate([row.documents for row in block.rows])
        composed = composer.compose(np.arange(250), epoch)
        assert sorted(seen.tolist()) == np.flatnonzero(composed.num_images).tolist()
        assert {row.epoch for row in block.rows} == {epoch}
        for row in block.rows:
            assert composed.lengths[row.documents].sum() <= CONFIG.seq_length
        statistics = plan.statistics(epoch)
        assert statistics.documents == len(seen)
        assert sum(statistics.skipped.values()) + statistics.documents == 250
        assert statistics.tokens == composed.lengths[seen].sum()
        assert statistics.targets == composed.num_targets[seen].sum()
        assert statistics.images == len(composed.images)
        assert statistics.pairs == composed.has_context.sum()


def test_skipped_documents_are_counted_by_reason(written: WrittenCorpus) -> None:
    good = [any(m.segment.similarity > 0.24 for m in d.images) for d in written.documents]
    short = dataclasses.replace(CONFIG, seq_length=12)
    skipped = make_plan(written, config=short).statistics().skipped
    assert skipped[NO_SIMILAR_IMAGE] == 250 - sum(good)
    assert skipped[IMAGES_CUT_OFF] > 0
    assert make_plan(written, config=dataclasses.replace(CONFIG, seq_length=2048)).statistics().skipped == {
        NO_SIMILAR_IMAGE: 250 - sum(good),
        IMAGES_CUT_OFF: 0,
    }


def test_epochs_and_seeds_differ_in_order(written: WrittenCorpus) -> None:
    plan = make_plan(written)
    rows = plan.num_rows_per_epoch(0)
    orders = [
        np.concatenate([r.documents for r in block.rows]).tolist()
        for block in (
            plan.sequence.read(0, rows),
            plan.sequence.read(rows, plan.num_rows_per_epoch(1)),
            make_plan(written, seed=SEED + 1).sequence.read(0, 40),
        )
    ]
    assert orders[0] != orders[1]
    assert orders[0][:40] != orders[2][:40]


def test_rows_are_not_sorted_by_length(written: WrittenCorpus) -> None:
    """Packing yields long rows first; a run must not: rank correlation of place and documents within 4 sigma."""
    plan = make_plan(written, config=dataclasses.replace(CONFIG, packing_window=1000))
    counts = [len(row.documents) for row in plan.sequence.read(0, plan.num_rows_per_epoch()).rows]
    assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 4 / len(counts) ** 0.5


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


def test_starting_at_a_window_equals_packing_all_before(written: WrittenCorpus) -> None:
    plan = make_plan(written)
    for consumed in (0, 55, 12 * 40):
        start = plan.window_start(consumed)
        assert start.row <= consumed
        resumed = make_plan(written, start=start)
        expected = contents(plan.step(0, first_row=consumed))
        assert contents(resumed.step(0, first_row=consumed)) == expected
        assert contents(resumed.step(0, first_row=3)) == contents(plan.step(0, first_row=3))
        assert contents(resumed.step(0, first_row=consumed)) == expected


def test_layout_announces_what_the_batches_hold(written: WrittenCorpus) -> None:
    plan = make_plan(written, (24, 3, 4))
    composer = plan.sequence.composer
    for number in range(4):
        step = plan.step(number)
        targets = tokens = squares = 0
        ranks = [step.micro_batches(rank) for rank in range(4)]
        for m in range(2):
            for rank in range(4):
                batch = collate_rows(composer, ranks[rank][m]).batch
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


def test_row_image_budget_holds(written: WrittenCorpus) -> None:
    plan = make_plan(written, config=dataclasses.replace(CONFIG, max_images_per_row=4, seq_length=400))
    block = plan.sequence.read(0, plan.num_rows_per_epoch())
    assert block.counts.num_images.max() == 4


def test_fingerprint_changes_with_what_decides_the_rows_only(written: WrittenCorpus) -> None:
    plan = make_plan(written)
    assert make_plan(written, (24, 3, 4)).fingerprint == plan.fingerprint
    assert make_plan(written, config=dataclasses.replace(CONFIG, num_workers=7)).fingerprint == plan.fingerprint
    assert make_plan(written, seed=SEED + 1).fingerprint != plan.fingerprint
    assert make_plan(written, config=dataclasses.replace(CONFIG, packing_window=41)).fingerprint != plan.fingerprint


def test_impossible_configurations_are_refused(written: WrittenCorpus) -> None:
    with pytest.raises(ConfigError, match="global_batch_size = 12 is not a positive multiple of .* 5 x 2 = 10"):
        make_plan(written, (12, 5, 2))
    with pytest.raises(ConfigError, match="max_images_per_row = 2 is less than .* = 3"):
        make_plan(written, config=dataclasses.replace(CONFIG, max_images_per_row=2))
    with pytest.raises(ConfigError, match="none of the corpus's 250 documents has an image with similarity >= "):
        make_plan(written, config=dataclasses.replace(CONFIG, min_similarity=0.9))


def test_a_corpus_whose_images_are_all_cut_off_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    documents = [
        d
        for d in random_documents(300, 2)
        if d.segments and len(d.segments[0]) == 40 and d.images and all(m.segment.segment_index > 0 for m in d.images)
    ]
    assert documents
    written = write(tmp_path_factory.mktemp("cut"), documents)
    plan = make_plan(written, config=dataclasses.replace(CONFIG, seq_length=20))
    with pytest.raises(ConfigError, match="gave no row: all images behind the cut at seq_length = 20"):
        plan.step(0)
