"""Rows of a step, as a page and as text.

Oracles: the batches that ``StepLoader`` gives to training, counted in plain Python; the attention mask position by
position; ``html.parser``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lcl_megatron.config import DataConfig
from lcl_megatron.config.errors import ConfigError
from lcl_megatron.data.batch import PackedBatch, StepBatch
from lcl_megatron.data.decoding.images import decode_rgb, resize
from lcl_megatron.data.loader import StepLoader
from lcl_megatron.data.pages.step_page import write_step_page
from lcl_megatron.data.pages.step_text import render_step
from lcl_megatron.data.pages.step_view import Selection, StepView, attention_mask, view_step
from lcl_megatron.data.planning.plan import Plan
from lcl_megatron.data.storage.corpus import Corpus
from tests.html_page import Node, assert_harmless, image_pixels, read_page
from tests.training.small_runs import IMAGE_SIZE, DataFolder, sentence

NUM_LATENTS = 4
HOSTILE = "<script>alert(1)</script> <BoI><image></s> &amp; \x1b[31m\u202e"
FOREIGN = "caf\u00e9 \u4e2d\u6587 \u0627\u0644 \U0001f600\nline"
STEP = 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Hostile and foreign text, images first and images behind text, two images that are cut short."""
    data = DataFolder(tmp_path_factory.mktemp("inspect"))
    documents = [
        (
            (HOSTILE, sentence(number), FOREIGN, "")[number % 3 :],
            [(f"{number}<b>.png", 0), (f"{number}b.png", 1)][: 1 + number % 2],
        )
        for number in range(24)
    ]
    data.write(documents)
    for number in range(0, 24, 3):
        data.truncate(f"{number}<b>.png")
    for number in range(1, 24, 4):
        data.truncate(f"{number}b.png")
    return data.preprocess().corpus


def make_plan(corpus: Corpus, **changes: object) -> Plan:
    settings: dict[str, object] = {"seq_length": 96, "num_workers": 0, "crop_scale": (0.5, 1.0)}
    return Plan([corpus], DataConfig(**settings | changes), NUM_LATENTS, 8, 2, 2, seed=3)


@pytest.fixture(scope="module")
def plan(corpus: Corpus) -> Plan:
    return make_plan(corpus)


@pytest.fixture(scope="module")
def trained(plan: Plan) -> StepBatch:
    """What data-parallel rank 1 reads at the step."""
    return next(iter(StepLoader(plan, 1, IMAGE_SIZE, start_step=STEP, end_step=STEP + 1)))


@pytest.fixture(scope="module")
def view(plan: Plan) -> StepView:
    return view_step(plan, IMAGE_SIZE, Selection(step=STEP, rows=4, dp_rank=1))


@pytest.fixture(scope="module")
def page(view: StepView, tmp_path_factory: pytest.TempPathFactory) -> Node:
    path = tmp_path_factory.mktemp("pages") / "new" / "step.html"
    write_step_page(view, path)
    page = read_page(path)
    assert_harmless(page)
    return page


def rows_of(step: StepBatch) -> Iterator[tuple[PackedBatch, int]]:
    """Every row of a step, with its micro-batch."""
    for batch in step.micro_batches:
        for row in range(batch.tokens.shape[0]):
            yield batch, row


def slots_of(batch: PackedBatch, row: int) -> list[int]:
    """Image slots of one row of a micro-batch."""
    length = batch.tokens.shape[1]
    return [i for i in range(batch.num_images) if int(batch.image_slots[i]) // length == row]


def test_the_fixture_has_every_case(trained: StepBatch) -> None:
    has_context = np.concatenate([batch.has_context[: batch.num_images] for batch in trained.micro_batches])
    image_ok = np.concatenate([batch.image_ok[: batch.num_images] for batch in trained.micro_batches])
    assert 0 < image_ok.sum() < len(image_ok)
    assert 0 < has_context.sum() < len(has_context)
    assert (has_context & ~image_ok).any()


def test_tokens_and_targets_on_the_page_are_those_of_the_batch(page: Node, trained: StepBatch) -> None:
    sections = page.all("section")
    assert len(sections) == 4
    for section, (batch, row) in zip(sections, rows_of(trained), strict=True):
        shown = [node for node in section.all() if "data-id" in node.attributes]
        ids = [
            int(node.attributes["data-id"]) for node in shown for _ in range(int(node.attributes.get("data-count", 1)))
        ]
        assert ids == batch.tokens[row].tolist()
        assert sum("target" in node.attributes["class"].split() for node in shown) == int(batch.loss_mask[row].sum())

        place = row * len(ids)
        for node in shown:
            title = node.attributes["title"].split(" \u00b7 ")
            inside = place - row * len(ids)
            assert title[0] == f"id {batch.tokens[row, inside]}"
            assert title[1].split(" to ")[0] == f"flat {place}"
            assert title[2].split(" to ")[0] == f"position {batch.position_ids[row, inside]}"
            has_label = bool(batch.loss_mask[row, inside])
            assert title[3] == (f"label {batch.labels[row, inside]}" if has_label else "no label")
            assert ("is predicted" in title) == (inside > 0 and bool(batch.loss_mask[row, inside - 1]))
            place += int(node.attributes.get("data-count", 1))


def test_documents_on_the_page_are_those_of_the_batch(page: Node, plan: Plan, trained: StepBatch) -> None:
    planned = [row for rows in plan.step(STEP).micro_batches(1) for row in rows]
    for section, row, (batch, number) in zip(page.all("section"), planned, rows_of(trained), strict=True):
        length = batch.tokens.shape[1]
        borders = [b for b in batch.cu_seqlens.tolist() if number * length <= b <= (number + 1) * length]
        headings = [node.text.split(" \u00b7 ") for node in section.all("h3")]
        sizes = [int(heading[1].split()[0]) for heading in headings]
        assert sizes == [b - a for a, b in itertools.pairwise(borders)]
        sources = [plan.sequence.sources[0].corpus.document_source(d) for d in row.documents.tolist()]
        assert [heading[0] for heading in headings] == sources + ["padding"] * (len(sizes) - len(sources))
        padding = int((batch.tokens[number] == plan.sequence.sources[0].corpus.special_tokens.pad).sum())
        assert f"{length - padding} of {length} positions filled" in section.text
        assert f"Row {row.index}" == section.all("h2")[0].text


def test_images_on_the_page_are_those_of_the_batch(page: Node, trained: StepBatch, corpus: Corpus) -> None:
    for section, (batch, row) in zip(page.all("section"), rows_of(trained), strict=True):
        shown = section.all("span", "image")
        assert len(shown) == len(slots_of(batch, row))
        for node, slot in zip(shown, slots_of(batch, row), strict=True):
            assert batch.images is not None
            (image,) = node.all("img")
            np.testing.assert_array_equal(image_pixels(image), batch.images[slot].permute(1, 2, 0))
            index = int(batch.image_keys[slot]) % (1 << 40) - 1
            assert image.attributes["title"] == corpus.image_source(index)
            assert f"similarity {corpus.image_similarity[index]:.3f}" in node.text
            assert f"key {int(batch.image_keys[slot])}" in node.text
            assert (len(node.all("span", "good")) == 1) == bool(batch.pair_mask[slot])
            assert ("bad" in node.attributes["class"]) == (not batch.image_ok[slot])
            if not batch.image_ok[slot]:
                (line,) = {bad for bad in trained.bad_images if bad.startswith(corpus.image_source(index))}
                assert line.removeprefix(f"{corpus.image_source(index)}: ") in node.all("span", "wrong")[0].text
            elif not batch.has_context[slot]:
                assert "no text and no image stands before it" in node.all("span", "quiet")[0].text
        contexts = sum(bool(batch.pair_mask[slot]) for slot in slots_of(batch, row))
        assert len(section.all("b", "context")) == contexts


def test_the_crop_on_the_page_is_the_part_that_is_shown(view: StepView, plan: Plan) -> None:
    """Cutting the box out of the decoded image and resizing it gives the pixels: the box is in the image's pixels."""
    corpus, seen = plan.sequence.sources[0].corpus, set()
    for image in [image for row in view.rows for image in row.images if not image.error]:
        index = image.key % (1 << 40) - 1
        pixels = decode_rgb(corpus.image_bytes(index), 10**6)
        assert (image.height, image.width) == pixels.shape[:2]
        assert image.crop is not None
        top, left, height, width = image.crop
        cropped = resize(pixels[top : top + height, left : left + width], IMAGE_SIZE, IMAGE_SIZE)
        # Another decoder or resize may be within 2/255 of this one.
        assert (cropped.int() - image.pixels.int()).abs().max() <= 2
        seen.add(image.crop)
    assert len(seen) > 3


def test_header_counts_are_those_of_all_ranks(page: Node, plan: Plan) -> None:
    steps = [next(iter(StepLoader(plan, rank, IMAGE_SIZE, start_step=STEP, end_step=STEP + 1))) for rank in (0, 1)]
    batches = [batch for step in steps for batch in step.micro_batches]
    values = {node.all("span")[0].text: node.all("b")[0].text for node in page.all("div", "cards")[0].all("div")}
    pad = plan.sequence.sources[0].corpus.special_tokens.pad
    filled = sum(int((batch.tokens != pad).sum()) for batch in batches) / sum(batch.tokens.numel() for batch in batches)
    assert values["Rows of the step"] == "8"
    assert values["Filled"] == f"{filled:.1%}"
    assert values["Text targets"] == f"{sum(int(batch.loss_mask.sum()) for batch in batches):,}"
    assert values["Images"] == str(sum(batch.num_images for batch in batches))
    contexts = sum(int(batch.has_context[: batch.num_images].sum()) for batch in batches)
    assert values["Images with a context"] == str(contexts)
    rows = [[int(cell.text) for cell in row.all("td")] for row in page.all("table")[0].all("tr")[1:]]
    per_rank = [[batch.num_images for batch in step.micro_batches] for step in steps]
    assert rows == [[m, a, b, a + b] for m, (a, b) in enumerate(zip(*per_rank, strict=True))]


def test_text_comes_through(page: Node, corpus: Corpus) -> None:
    texts = [
        "".join(node.text for node in article.all("span", "t")).replace("\u00b7", "") for article in page.all("article")
    ]
    assert any("<script>alert(1)</script> <BoI><image></s> &amp; \u241b[31m\ufffd" in text for text in texts)
    assert any("caf\u00e9 \u4e2d\u6587 \u0627\u0644 \U0001f600\u23celine" in text for text in texts)


def test_attention_picture_is_the_block_diagonal_causal_mask(view: StepView, trained: StepBatch) -> None:
    for row, (batch, number) in zip(view.rows, rows_of(trained), strict=True):
        length = batch.tokens.shape[1]
        document = [sum(int(b) <= number * length + p for b in batch.cu_seqlens) for p in range(length)]
        mask = np.array([[document[q] == document[k] and k <= q for k in range(length)] for q in range(length)])
        np.testing.assert_array_equal(attention_mask(row, 1000), mask)
        np.testing.assert_allclose(attention_mask(row, 24), mask.reshape(24, 4, 24, 4).mean(axis=(1, 3)))
        uneven = attention_mask(row, 7)
        edges = [length * i // 7 for i in range(8)]
        fields = [[mask[a:b, c:d].mean() for c, d in itertools.pairwise(edges)] for a, b in itertools.pairwise(edges)]
        np.testing.assert_allclose(uneven, fields)


def test_text_rendering_names_everything_and_steers_no_terminal(view: StepView, trained: StepBatch) -> None:
    text = render_step(view)
    assert not {c for c in text if (ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 or c == "\u202e"}
    joined = " ".join(text.split())
    assert f"step {STEP}: rows 8 to 15" in text
    for batch, row in rows_of(trained):
        slots = slots_of(batch, row)
        contrasted = sum(bool(batch.pair_mask[slot]) for slot in slots)
        targets = int(batch.loss_mask[row].sum())
        assert f"images {len(slots)}, contrasted {contrasted}, targets {targets}\n" in text
    assert joined.count("<BoI: context>") == sum(int(batch.pair_mask.sum()) for batch in trained.micro_batches)
    assert joined.count("[image ") == sum(batch.num_images for batch in trained.micro_batches)
    assert joined.count("BAD: cannot be decoded") == len(trained.bad_images)
    assert "\u4e2d\u6587" in text
    assert "<script>alert(1)</script>" in joined


def test_later_micro_batches_and_more_rows_than_there_are(plan: Plan, trained: StepBatch) -> None:
    view = view_step(plan, IMAGE_SIZE, Selection(step=STEP, rows=99, dp_rank=1, micro_batch=1))
    assert [(row.micro_batch, row.number) for row in view.rows] == [(1, 0), (1, 1)]
    batch = trained.micro_batches[1]
    assert [[token.token for token in row.tokens] for row in view.rows] == batch.tokens.tolist()


def test_documents_that_rows_cut_say_where_they_go_on(corpus: Corpus, tmp_path: Path) -> None:
    plan = make_plan(corpus, layout="window", seq_length=40)
    view = view_step(plan, IMAGE_SIZE, Selection(rows=8))
    planned = [row for rows in plan.step(0).micro_batches(0) for row in rows]
    begins = [int(begin) for row in planned for begin in row.begins]
    documents = [document for row in view.rows for document in row.documents if document.source]
    assert [document.begin for document in documents] == begins
    assert any(begins)
    cut = [(d, image) for d in documents for image in d.images if image.no_context and d.begin]
    assert cut
    for document, image in cut:
        assert image.boi_position == document.tokens[0].flat_position
        assert image.no_context == "what stands before it in its document is in another row"
    write_step_page(view, tmp_path / "step.html")
    headings = " ".join(node.text for node in read_page(tmp_path / "step.html").all("h3"))
    assert [int(number) for number in re.findall(r"from its token (\d+) on", headings)] == [b for b in begins if b]
    assert f"tokens from its token {max(begins)} on, flat" in render_step(view)


def test_rows_of_mixed_corpora_and_of_pairs_name_their_sources(corpus: Corpus, tmp_path: Path) -> None:
    other = DataFolder(tmp_path / "other")
    other.write([(["", sentence(i)], [(f"{i}.png", 1)]) for i in range(30)])
    second = Corpus.open(other.preprocess().corpus.path.rename(tmp_path / "captions"))
    config = DataConfig(
        data_path=("a", "b"), view=("interleaved", "pairs"), mixture_weights=(1, 1), seq_length=64, num_workers=0
    )
    plan = Plan([corpus, second], config, NUM_LATENTS, 8, 8, 1, seed=3)
    (batch,) = next(iter(StepLoader(plan, 0, IMAGE_SIZE, end_step=1))).micro_batches
    view = view_step(plan, IMAGE_SIZE, Selection(rows=8))
    assert [[token.token for token in row.tokens] for row in view.rows] == batch.tokens.tolist()
    assert [image.key for row in view.rows for image in row.images] == batch.image_keys.tolist()

    known = {f"captions: {second.image_source(i)}" for i in range(second.num_images)}
    known |= {f"corpus: {corpus.image_source(i)}" for i in range(corpus.num_images)}
    seen = set()
    for document in [document for row in view.rows for document in row.documents if document.source]:
        folder = document.source.partition(": ")[0]
        seen.add(folder)
        for image in document.images:
            assert image.source in known
            whole = image.source if folder == "captions" else image.source.partition(" image ")[0]
            assert document.source == whole
    assert seen == {"captions", "corpus"}


def test_why_an_image_has_no_context_follows_the_rule(corpus: Corpus) -> None:
    view = view_step(make_plan(corpus, context_rule="index"), IMAGE_SIZE, Selection(rows=8))
    # Every document begins with BOS, so no <BoI> is at position 0.
    assert not [image for row in view.rows for image in row.images if image.no_context]


def test_wrong_selections_are_refused(plan: Plan) -> None:
    for selection, message in (
        (Selection(step=-1), "step -1: steps are numbered from 0"),
        (Selection(rows=0), "0 rows: at least 1"),
        (Selection(dp_rank=2), "dp_rank = 2: the step has 2 of them, numbered from 0"),
        (Selection(micro_batch=2), "micro_batch = 2: the step has 2 of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            view_step(plan, IMAGE_SIZE, selection)
