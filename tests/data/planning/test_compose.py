"""Oracle: the paper's rules as a slow loop over one document's segments, written without the vectorised code.

It shares with the composer only the hash that decides each random choice; that choices are fair is tested by counting.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lcl_megatron.config import ConfigError, DataConfig
from lcl_megatron.data.document import ImageKind, Source
from lcl_megatron.data.order import Stream, keyed_hash
from lcl_megatron.data.planning.compose import IMAGES_CUT_OFF, NO_SIMILAR_IMAGE, TOO_MANY_IMAGES, Composer
from lcl_megatron.data.storage.corpus_part import EncodedDocument
from lcl_megatron.data.storage.indexed_file import CorpusError
from tests.data.corpora import NUM_LATENTS, WrittenCorpus, random_documents, stored_image, write

SEED = 77


@dataclass
class SlowDocument:
    """What the loop makes of a document."""

    tokens: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    has_context: list[bool] = field(default_factory=list)
    num_targets: int = 0


def compose_slowly(written: WrittenCorpus, document: int, epoch: int, config: DataConfig) -> SlowDocument:
    special, encoded = written.corpus.special_tokens, written.documents[document]
    first = written.first_image(document)
    good = [i for i, image in enumerate(encoded.images) if image.segment.similarity >= config.min_similarity]

    def draw(stream: Stream, image: int) -> int:
        return int(keyed_hash(SEED, stream, epoch, first + image))

    by_sentence = defaultdict(list)
    for i in good:
        segment = encoded.images[i].segment
        by_sentence[(segment.segment_index, None if segment.kind is ImageKind.MATCHED else i)].append(i)
    single = [min(images, key=lambda i: draw(Stream.SENTENCE_IMAGE, i)) for images in by_sentence.values()]
    chosen = sorted(sorted(single, key=lambda i: draw(Stream.IMAGE_CHOICE, i))[: config.max_images_per_document])

    # (segment, rank): an image behind the segment before comes first, then images before it, then its text.
    places: list[tuple[int, int, int | list[int]]] = []
    for i in chosen:
        segment = encoded.images[i].segment
        is_after = segment.kind is ImageKind.MATCHED and draw(Stream.PLACEMENT, i) >= 2**63
        places.append((segment.segment_index + is_after, 0 if is_after else 1, i))
    places += [(index, 2, list(text)) for index, text in enumerate(encoded.segments)]
    items = [item for _, _, item in sorted(places, key=lambda place: place[:2])]

    result = SlowDocument(tokens=[special.bos])
    has_content = False
    for item in items:
        piece = item if isinstance(item, list) else [special.boi] + [special.image] * NUM_LATENTS + [special.eoi]
        if len(result.tokens) + len(piece) + 1 > config.seq_length:
            break
        if isinstance(item, int):
            result.images.append(first + item)
            result.positions.append(len(result.tokens))
            result.has_context.append(has_content if config.context_rule == "content" else len(result.tokens) > 0)
        result.tokens += piece
        has_content = has_content or len(piece) > 0
    result.tokens.append(special.eos)
    for token in result.tokens[1:]:
        result.num_targets += token not in (special.image, special.eoi)
    return result


@pytest.fixture(scope="module", params=[0, 1, 2])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WrittenCorpus:
    return write(tmp_path_factory.mktemp("compose"), random_documents(200, request.param))


@pytest.mark.parametrize("seq_length", [12, 64, 2048])
@pytest.mark.parametrize("context_rule", ["content", "index"])
def test_composing_many_equals_the_loop_and_the_tokens(
    written: WrittenCorpus, seq_length: int, context_rule: str
) -> None:
    config = DataConfig(seq_length=seq_length, context_rule=context_rule, max_images_per_document=3)
    composer = Composer(written.corpus, config, NUM_LATENTS, SEED)
    rng = np.random.default_rng(seq_length)
    documents, epochs = rng.permutation(200), rng.integers(0, 3, 200)
    composed = composer.compose(documents, epochs)
    for index, (document, epoch) in enumerate(zip(documents.tolist(), epochs.tolist(), strict=True)):
        expected = compose_slowly(written, document, epoch, config)
        images = slice(composed.image_offsets[index], composed.image_offsets[index + 1])
        assert composed.lengths[index] == len(expected.tokens)
        assert composed.images[images].tolist() == expected.images
        assert composed.image_positions[images].tolist() == expected.positions
        assert composed.has_context[images].tolist() == expected.has_context
        assert composed.num_targets[index] == expected.num_targets
        assert composer.tokens(composed, index).tolist() == expected.tokens


def test_composing_one_equals_composing_many(written: WrittenCorpus) -> None:
    composer = Composer(written.corpus, DataConfig(seq_length=64), NUM_LATENTS, SEED)
    many = composer.compose(np.arange(200), 1)
    for document in range(0, 200, 7):
        one = composer.compose(np.array([document]), 1)
        assert one.lengths[0] == many.lengths[document]
        images = slice(many.image_offsets[document], many.image_offsets[document + 1])
        assert np.array_equal(one.image_positions, many.image_positions[images])
    assert len(composer.compose(np.zeros(0, dtype=np.int64), 1).lengths) == 0


@pytest.mark.parametrize("too_many_images", ["sample", "skip"])
@pytest.mark.parametrize("seq_length", [12, 64, 2048])
def test_sizes_bound_every_epoch_and_are_exact_unless_the_tail_is_cut(
    written: WrittenCorpus, seq_length: int, too_many_images: Literal["sample", "skip"]
) -> None:
    config = DataConfig(seq_length=seq_length, max_images_per_document=3, too_many_images=too_many_images)
    composer = Composer(written.corpus, config, NUM_LATENTS, SEED)
    sizes = composer.sizes(0, 200)
    parts = [composer.sizes(begin, min(200, begin + 7)) for begin in range(0, 200, 7)]
    assert np.array_equal(sizes.lengths, np.concatenate([part.lengths for part in parts]))
    assert np.array_equal(sizes.num_images, np.concatenate([part.num_images for part in parts]))
    left_out: Counter[str] = Counter()
    for document, encoded in enumerate(written.documents):
        good = [m.segment for m in encoded.images if m.segment.similarity >= config.min_similarity]
        epochs = [compose_slowly(written, document, epoch, config) for epoch in range(5)]
        first_fits = [
            1 + sum(map(len, encoded.segments[: m.segment_index])) + NUM_LATENTS + 2 < seq_length for m in good
        ]
        reason = (
            NO_SIMILAR_IMAGE
            if not good
            else TOO_MANY_IMAGES
            if too_many_images == "skip" and len(good) > 3
            else IMAGES_CUT_OFF
            if not any(first_fits)
            else ""
        )
        assert (sizes.lengths[document] == 0) == bool(reason)
        if reason:
            left_out[reason] += 1
            continue
        sentences = {m.segment_index for m in good if m.kind is ImageKind.MATCHED}
        inline = sum(m.kind is ImageKind.INLINE for m in good)
        whole = 2 + sum(map(len, encoded.segments)) + min(3, len(sentences) + inline) * (NUM_LATENTS + 2)
        if whole <= seq_length:
            assert {(len(e.tokens), len(e.images)) for e in epochs} == {
                (sizes.lengths[document], sizes.num_images[document])
            }
        else:
            assert sizes.lengths[document] == seq_length
            assert all(len(e.images) <= sizes.num_images[document] for e in epochs)
    assert {reason: number for reason, number in sizes.left_out.items() if number} == left_out


@given(cut=st.integers(0, 200), document=st.integers(0, 199))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_a_document_are_slices_of_its_tokens(written: WrittenCorpus, cut: int, document: int) -> None:
    composer = Composer(written.corpus, DataConfig(layout="window"), NUM_LATENTS, SEED)
    whole = composer.compose(np.array([document]), 3)
    tokens = composer.tokens(whole, 0)
    special = written.corpus.special_tokens
    cut = min(cut, len(tokens) - 1)
    while tokens[cut] in (special.image, special.eoi):  # no border goes through an image
        cut += 1
    for begin, end in ((0, cut), (cut, len(tokens))):
        if begin == end:
            continue
        part = whole.part(np.array([begin]), np.array([end]), NUM_LATENTS)
        shown = tokens[begin:end].tolist()
        assert part.lengths.tolist() == [len(shown)]
        assert part.image_positions.tolist() == [i for i, token in enumerate(shown) if token == special.boi]
        assert part.num_targets.tolist() == [sum(token not in (special.image, special.eoi) for token in shown[1:])]
        content = [i for i, token in enumerate(shown) if token not in (special.bos, special.eos)]
        assert part.has_context.tolist() == [bool(content and content[0] < i) for i in part.image_positions]


def test_documents_cut_into_windows_look_the_same_in_every_epoch_and_run(written: WrittenCorpus) -> None:
    config = DataConfig(layout="window", max_images_per_document=1)
    first = Composer(written.corpus, config, NUM_LATENTS, SEED).compose(np.arange(200), 0)
    other = Composer(written.corpus, config, NUM_LATENTS, SEED + 1).compose(np.arange(200), 7)
    assert np.array_equal(first.images, other.images)
    assert np.array_equal(first.image_positions, other.image_positions)
    assert set(other.epochs.tolist()) == {7}


def test_choices_and_placement_are_fair(tmp_path: Path) -> None:
    """3 images on one sentence, 4 alone: 3,000 epochs; shares within 4 standard errors (0.037)."""
    images = [stored_image(i, 0, 1.0, ImageKind.MATCHED, b"x") for i in range(3)]
    images += [stored_image(3 + i, 1 + i, 1.0, ImageKind.MATCHED, b"x") for i in range(4)]
    written = write(tmp_path, [EncodedDocument([[9, 9]] * 6, images, Source("d", 1))])
    composer = Composer(written.corpus, DataConfig(seq_length=64, max_images_per_document=2), NUM_LATENTS, SEED)
    chosen: Counter[int] = Counter()
    before = 0
    for epoch in range(3000):
        composed = composer.compose(np.array([0]), epoch)
        chosen.update(composed.images.tolist())
        text_before = composed.image_positions - 1 - np.arange(2) * (NUM_LATENTS + 2)
        sentence = np.maximum(composed.images - 2, 0)
        assert set((text_before - 2 * sentence).tolist()) <= {0, 2}
        before += int((text_before == 2 * sentence).sum())
    shares = np.array([chosen[i] for i in range(7)]) / 3000
    np.testing.assert_allclose(shares, [2 / 5 / 3] * 3 + [2 / 5] * 4, atol=0.037)
    assert abs(before / 6000 - 0.5) < 0.026


def test_first_image_has_no_context_unless_text_precedes_it(tmp_path: Path) -> None:
    images = [stored_image(i, i, 1.0, ImageKind.INLINE, b"x") for i in range(3)]
    documents = [EncodedDocument([[], [9]], images, Source("d", 1))]
    written = write(tmp_path, documents)
    for rule, expected in (("content", [False, True, True]), ("index", [True, True, True])):
        composer = Composer(written.corpus, DataConfig(seq_length=64, context_rule=rule), NUM_LATENTS, SEED)
        assert composer.compose(np.array([0]), 0).has_context.tolist() == expected


def test_a_row_too_short_for_an_image_is_refused(written: WrittenCorpus) -> None:
    with pytest.raises(ConfigError, match=r"seq_length = 7 cannot hold .* 8 tokens"):
        Composer(written.corpus, DataConfig(seq_length=7), NUM_LATENTS, SEED)


def test_side_arrays_that_disagree_with_the_tokens_are_found(tmp_path: Path) -> None:
    written = write(tmp_path, [EncodedDocument([[9, 10, 11]], [], Source("d", 1))])
    composer = Composer(written.corpus, DataConfig(seq_length=64), NUM_LATENTS, SEED)
    composed = composer.compose(np.array([0]), 0)
    composed.lengths[0] += 1
    with pytest.raises(CorpusError, match="hold 3 tokens, the side arrays announce 4"):
        composer.tokens(composed, 0)
