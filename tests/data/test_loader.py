"""Oracles: the same steps made in this process without a loader; processes that are killed, and bytes that are cut."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.batch import PackedBatch, StepBatch
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.corpus import Corpus
from lcl_megatron.data.corpus_part import EncodedDocument, StoredImage
from lcl_megatron.data.images import TrainingTransform
from lcl_megatron.data.indexed_file import CorpusError
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.plan import Plan
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, write

CONFIG = DataConfig(seq_length=96, max_images_per_document=3, num_workers=0)
SIZE = 28
SEED = 5


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    return write(tmp_path_factory.mktemp("loader"), random_documents(60, 21, with_pixels=True))


def make_plan(corpus: Corpus, num_workers: int = 0, batch: tuple[int, int, int] = (8, 2, 2)) -> Plan:
    config = dataclasses.replace(CONFIG, num_workers=num_workers)
    return Plan([corpus], config, NUM_LATENTS, *batch, SEED)


def read(steps: Iterator[StepBatch], number: int) -> list[StepBatch]:
    return [next(steps) for _ in range(number)]


def assert_equal(found: PackedBatch, expected: PackedBatch) -> None:
    for field in dataclasses.fields(PackedBatch):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def make_directly(corpus: Corpus, step: int, dp_rank: int) -> list[PackedBatch]:
    """The micro-batches of a step, image by image."""
    plan = make_plan(corpus)
    transform = TrainingTransform(size=SIZE, seed=SEED)
    batches = []
    for rows in plan.step(step).micro_batches(dp_rank):
        collated = collate_rows(plan.sequence, rows)
        keys = collated.batch.image_keys.tolist()
        images = [transform(corpus.image_bytes(i), k) for i, k in zip(collated.images.tolist(), keys, strict=True)]
        batches.append(dataclasses.replace(collated.batch, images=torch.stack(images)))
    return batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create 5 worker processes")
@pytest.mark.parametrize("num_workers", [0, 1, 2, 5])
def test_steps_come_in_order_whatever_the_number_of_workers(written: WrittenCorpus, num_workers: int) -> None:
    loader = StepLoader(make_plan(written.corpus, num_workers), 1, SIZE, start_step=2, end_step=10)
    steps = list(loader)
    assert [batch.step for batch in steps] == list(range(2, 10))
    for batch in steps:
        expected = make_directly(written.corpus, batch.step, 1)
        assert len(batch.micro_batches) == len(expected) == 2
        for found, other in zip(batch.micro_batches, expected, strict=True):
            assert_equal(found, other)
        assert batch.bad_images == ()
        assert batch.layout.num_images[:, 1].tolist() == [b.num_images for b in batch.micro_batches]


def test_ranks_of_any_layout_see_the_same_images(written: WrittenCorpus) -> None:
    """Keys and pixels of a step: one rank, two ranks, four ranks."""
    found = []
    for dp in (1, 2, 4):
        plan = make_plan(written.corpus, batch=(8, 2, dp))
        pixels: dict[int, torch.Tensor] = {}
        for rank in range(dp):
            (batch,) = StepLoader(plan, rank, SIZE, start_step=3, end_step=4)
            for micro_batch in batch.micro_batches:
                assert micro_batch.images is not None
                pixels.update(zip(micro_batch.image_keys.tolist(), micro_batch.images, strict=True))
        found.append(pixels)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[key], found[0][key]) for key in other)


def test_resuming_equals_going_on_also_with_another_global_batch(written: WrittenCorpus) -> None:
    whole = list(StepLoader(make_plan(written.corpus), 0, SIZE, end_step=6))
    resumed = list(StepLoader(make_plan(written.corpus), 0, SIZE, start_step=4, end_step=6))
    for found, expected in zip(resumed, whole[4:], strict=True):
        for a, b in zip(found.micro_batches, expected.micro_batches, strict=True):
            assert_equal(a, b)
    # 4 steps of 8 rows are consumed; with 16 rows a step, the next one holds what steps 4 and 5 held.
    plan = make_plan(written.corpus, batch=(16, 16, 1))
    (step,) = StepLoader(plan, 0, SIZE, start_step=4, consumed_rows=32, end_step=5)
    keys = [set(step.micro_batches[0].image_keys.tolist())]
    old = make_plan(written.corpus, batch=(8, 8, 1))
    keys.append(
        {
            key
            for s in StepLoader(old, 0, SIZE, start_step=4, end_step=6)
            for key in s.micro_batches[0].image_keys.tolist()
        }
    )
    assert keys[0] == keys[1]


def test_without_images_everything_else_is_the_same(written: WrittenCorpus) -> None:
    plan = make_plan(written.corpus)
    for bare, full in zip(
        StepLoader(plan, 0, SIZE, with_images=False, end_step=3), StepLoader(plan, 0, SIZE, end_step=3), strict=True
    ):
        for a, b in zip(bare.micro_batches, full.micro_batches, strict=True):
            assert a.images is None
            assert_equal(a, dataclasses.replace(b, images=None))


def with_bad_images(documents: list[EncodedDocument]) -> list[EncodedDocument]:
    """Every third image is half a JPEG, every fourth a web page."""
    broken, count = [], 0
    for document in documents:
        images: list[StoredImage] = []
        for image in document.images:
            count += 1
            data = image.data[: len(image.data) // 2] if count % 3 == 0 else image.data
            images.append(dataclasses.replace(image, data=b"<html>not found</html>" if count % 4 == 0 else data))
        broken.append(dataclasses.replace(document, images=images))
    return broken


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_images_are_blank_and_named_and_change_nothing_else(
    tmp_path: Path, written: WrittenCorpus, num_workers: int
) -> None:
    corpus = write(tmp_path, with_bad_images(written.documents)).corpus
    num_bad = 0
    for found, good in zip(
        StepLoader(make_plan(corpus, num_workers), 0, SIZE, end_step=6),
        StepLoader(make_plan(written.corpus), 0, SIZE, end_step=6),
        strict=True,
    ):
        bad_here = 0
        for a, b in zip(found.micro_batches, good.micro_batches, strict=True):
            assert a.images is not None
            assert b.images is not None
            ok = a.image_ok
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.image_keys, b.image_keys)
            assert torch.equal(a.images[ok], b.images[ok])
            blank = torch.tensor(BLANK_PIXEL, dtype=torch.uint8)[None, :, None, None]
            assert (a.images[~ok] == blank).all()
            assert not a.pair_mask[~ok].any()
            bad_here += int((~ok).sum())
        assert len(found.bad_images) == bad_here
        for message in found.bad_images:
            source, reason = message.split("): ", 1)
            assert source.startswith("docs.jsonl:")
            assert " image " in source
            assert "truncated" in reason.lower() or "no image of a known format" in reason
        num_bad += bad_here
    assert num_bad > 10


def test_killed_worker_ends_the_loop_with_a_clear_error(written: WrittenCorpus) -> None:
    steps = iter(StepLoader(make_plan(written.corpus, 1), 0, SIZE))
    next(steps)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"a loader process died .*lower --num-workers"):
        read(steps, 20)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_corpus_ends_the_loop_with_its_own_error(
    tmp_path: Path, written: WrittenCorpus, num_workers: int
) -> None:
    corpus = write(tmp_path, written.documents).corpus
    plan = make_plan(corpus, num_workers)
    steps = iter(StepLoader(plan, 0, SIZE))
    next(steps)
    os.truncate(corpus.path / "tokens.bin", 0)
    with pytest.raises(CorpusError, match=r"tokens.bin ends inside sequence"):
        read(steps, 20)


def test_leaving_the_loop_early_ends_the_workers(written: WrittenCorpus) -> None:
    steps = iter(StepLoader(make_plan(written.corpus, 2), 0, SIZE))
    read(steps, 3)
    assert len(multiprocessing.active_children()) == 2
    del steps
    assert multiprocessing.active_children() == []


def test_a_step_of_many_micro_batches_takes_few_file_descriptors(written: WrittenCorpus) -> None:
    """Each tensor by itself would take one: 32 micro-batches x 13 tensors x 2 steps ahead."""
    steps = iter(StepLoader(make_plan(written.corpus, 1, (32, 1, 1)), 0, SIZE))
    before = len(os.listdir("/proc/self/fd"))
    held = read(steps, 3)
    assert len(os.listdir("/proc/self/fd")) - before < 32
    assert len(held[0].micro_batches) == 32


def test_rank_that_does_not_exist_is_refused(written: WrittenCorpus) -> None:
    with pytest.raises(ConfigError, match="dp_rank = 2; the plan deals rows to 2"):
        StepLoader(make_plan(written.corpus), 2, SIZE)
