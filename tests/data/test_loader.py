"""Oracles: the same steps made image by image without a loader; bytes that are cut; the list of living threads."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.config.image import BLANK_PIXEL
from lcl_megatron.data.batch import PackedBatch, StepBatch
from lcl_megatron.data.collate import collate_rows
from lcl_megatron.data.decoding.images import TrainingTransform
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.storage.corpus import Corpus
from lcl_megatron.data.storage.corpus_part import EncodedDocument, StoredImage
from lcl_megatron.data.storage.indexed_file import CorpusError
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, write

CONFIG = DataConfig(seq_length=96, max_images_per_document=3, num_workers=0)
SIZE = 28
ROOT = Path(__file__).parents[2]
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


def threads() -> list[str]:
    """Names of the loader's threads."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("image-decoder", "step-planner"))]


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
        planned = make_plan(written.corpus).step(batch.step).micro_batches(1)
        assert batch.row_numbers == tuple(tuple(row.index for row in rows) for rows in planned)
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


@pytest.mark.parametrize("num_workers", [0, 3])
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


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["tokens", "images"])
def test_damaged_corpus_ends_the_loop_with_its_own_error(
    tmp_path: Path, written: WrittenCorpus, num_workers: int, name: str
) -> None:
    corpus = write(tmp_path, written.documents).corpus
    plan = make_plan(corpus, num_workers)
    steps = iter(StepLoader(plan, 0, SIZE))
    next(steps)
    os.truncate(corpus.path / f"{name}.bin", 0)
    with pytest.raises(CorpusError, match=rf"{name}.bin ends inside sequence"):
        read(steps, 20)
    assert threads() == []


def test_steps_behind_the_next_ones_are_not_begun(written: WrittenCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """``prefetch_factor`` bounds what is ahead: after the third step, the fourth and fifth are prepared, no sixth."""
    plan = make_plan(written.corpus, 2)
    asked: list[int] = []
    original = plan.step
    monkeypatch.setattr(plan, "step", lambda step, first_row: asked.append(step) or original(step, first_row))
    steps = iter(StepLoader(plan, 0, SIZE))
    assert read(steps, 3)[-1].step == 2
    steps.close()
    assert asked == sorted(asked)
    assert max(asked) <= 4


def fail_in_a_loop_over(steps: Iterator[StepBatch]) -> None:
    for step in steps:
        raise ZeroDivisionError(step.step)


@pytest.mark.parametrize("end", ["close", "forget", "raise"])
def test_leaving_the_loop_early_ends_the_threads(written: WrittenCorpus, end: str) -> None:
    steps = iter(StepLoader(make_plan(written.corpus, 2), 0, SIZE))
    read(steps, 3)
    assert sorted({name[:5] for name in threads()}) == ["image", "step-"]
    if end == "close":
        steps.close()
    elif end == "forget":
        del steps
    else:
        with pytest.raises(ZeroDivisionError):
            fail_in_a_loop_over(steps)
        del steps
    assert threads() == []


def test_threads_end_with_the_steps(written: WrittenCorpus) -> None:
    assert len(list(StepLoader(make_plan(written.corpus, 3), 0, SIZE, end_step=5))) == 5
    assert threads() == []


def test_process_ends_with_a_loader_in_use(written: WrittenCorpus) -> None:
    """A process of its own, killed after a minute: the loader is a global that nobody closes."""
    program = f"""
import dataclasses
from tests.data.test_loader import SIZE, Corpus, StepLoader, make_plan
steps = iter(StepLoader(make_plan(Corpus.open({str(written.corpus.path)!r}), 2), 0, SIZE))
print(next(steps).step)
raise SystemExit(3)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "0\n", "")


def test_image_backend_that_does_not_run_here_is_refused(
    written: WrittenCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = dataclasses.replace(CONFIG, image_backend="dali")
    plan = Plan([written.corpus], config, NUM_LATENTS, 8, 2, 2, SEED)
    monkeypatch.setattr("lcl_megatron.data.decoding.image_backend.has_dali", lambda: True)
    with pytest.raises(ConfigError, match="needs a CUDA device, and there is none; set --image-backend cpu"):
        StepLoader(plan, 0, SIZE)
    monkeypatch.setattr("lcl_megatron.data.decoding.image_backend.has_dali", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'lcl_megatron\[dali\]', or set --image-backend cpu"):
        StepLoader(plan, 0, SIZE)
    assert next(iter(StepLoader(plan, 0, SIZE, with_images=False))).micro_batches[0].images is None


def test_rank_that_does_not_exist_is_refused(written: WrittenCorpus) -> None:
    with pytest.raises(ConfigError, match="dp_rank = 2; the plan deals rows to 2"):
        StepLoader(make_plan(written.corpus), 2, SIZE)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_iterator_begins_with_the_first_step(written, num_workers):
    loader = StepLoader(make_plan(written.corpus, num_workers), 0, SIZE, start_step=3)
    first, second = (read(iter(loader), 2) for _ in range(2))
    assert [step.step for step in second] == [3, 4]
    assert_equal(first[0].micro_batches[0], second[0].micro_batches[0])
